"""First pages that stay with the prefill worker: a decode worker attends to them there."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from kvkeep.disagg.inlet import Inlet
from kvkeep.disagg.keeper import ROWS, bytes_of
from kvkeep.disagg.link import Faults
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import Block, Drop, Frame, Hold, rows_header
from kvkeep.engine.apart import PartState
from kvkeep.errors import SealError


class _Turn(NamedTuple):
    """Rows under way."""

    block: Block
    shape: tuple[int, int, int, int]
    """Of their states."""


class AfarPart:
    """The first pages of one request in another worker; a `Part`.

    The engine's thread asks and waits, the link's thread answers.
    """

    def __init__(
        self,
        request_id: str,
        number: int,
        pages: int,
        names: PromptPages,
        inlet: Inlet,
        expires_s: float,
        answer_s: float,
        faults: Faults,
    ) -> None:
        self.request_id = request_id
        self.number = number
        self.inlet = inlet
        self.expires_s = expires_s
        self.due_s: float | None = None
        """When it is given up, while it is not there; None: its prompt is being computed."""
        self._pages = pages
        self._names = names
        self._answer_s = answer_s
        self._faults = faults
        self._state: PartState = "awaited"
        self._turns = 0
        self._end_s = 0.0
        self._under_way: deque[_Turn] = deque()
        self._came: dict[int, torch.Tensor] = {}
        self._there = threading.Condition()

    # On the engine's thread

    @property
    def pages(self) -> int:
        """Return how many there are."""
        return self._pages

    @property
    def state(self) -> PartState:
        """Return where it stands; what is lost stays lost."""
        return self._state

    def hold(self) -> Hold:
        """Return what is asked for first: that the pages are held."""
        names = self._names
        chain = names.chain(self._pages)
        return Hold(self.number, self.request_id, self._pages, chain, names.digest)

    def ask(self, layer: int, q: torch.Tensor) -> None:
        """Send rows' queries [T, Hq, D]; waits for nothing."""
        self._end_s = time.monotonic() + self._answer_s
        heads, dim = q.shape[1:]
        for begin in range(0, len(q), ROWS):
            rows = q[begin : begin + ROWS]
            if self._state != "there":
                return
            self._turns = (self._turns + 1) % (1 << 32)
            count = len(rows)
            block = Block(self.number, layer, 1, self._turns, count, self._names.digest)
            raw = bytes_of(rows)
            try:
                payload = self._names.seal_rows(block, self._pages, raw, answer=False)
            except SealError as error:
                self._faults.note("sealing", error)
                self.lose()
                return
            with self._there:
                self._under_way.append(_Turn(block, (2, count, heads, dim + 2)))
            self.inlet.say((rows_header(block, payload), payload))

    def take(self) -> torch.Tensor | None:
        """Return the states of the rows asked for; None where they do not come in time."""
        found: list[torch.Tensor] = []
        with self._there:
            for turn in self._under_way:
                number = turn.block.first_page
                while number not in self._came and self._state == "there":
                    if not self._there.wait(self._end_s - time.monotonic()):
                        self._faults.note("no answer in time", "rows that attend elsewhere")
                        self._state = "lost"
                if self._state != "there":
                    self._came.clear()
                    self._under_way.clear()
                    return None
                found.append(self._came.pop(number))
            self._under_way.clear()
        return torch.cat(found, dim=1) if found and self._state == "there" else None

    def lose(self) -> None:
        """Give it up; from any thread."""
        with self._there:
            self._state = "lost"
            self._there.notify_all()

    # On the link's thread

    def held(self) -> None:
        """Hear that the pages are held."""
        with self._there:
            if self._state == "awaited":
                self._state = "there"

    def answered(self, block: Block, payload: memoryview) -> None:
        """Take what rows have gathered; what was not asked for, or does not open, ends it."""
        with self._there:
            turn = next((one for one in self._under_way if one.block == block), None)
        if turn is None:
            return  # nobody waits for it any more
        two, rows, heads, width = turn.shape
        try:
            size = 4 * two * rows * heads * width
            raw = self._names.open_rows(block, self._pages, payload, size, answer=True)
        except SealError as error:
            self._faults.note("rows that do not open", error)
            self.lose()
            return
        states = torch.frombuffer(raw, dtype=torch.float32).view(turn.shape)
        with self._there:
            self._came[block.first_page] = states
            self._there.notify_all()


class Afar:
    """All parts that one decode worker attends to elsewhere."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` has the engine's loop look."""
        self._wake = wake
        self._parts: dict[str, AfarPart] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._parts)

    def add(self, part: AfarPart) -> None:
        """Ask for a request's pages to be held."""
        self._parts[part.request_id] = part
        part.inlet.say(part.hold())

    def part_of(self, request_id: str) -> AfarPart | None:
        """Return a request's part."""
        return self._parts.get(request_id)

    def forget(self, request_id: str) -> None:
        """Let a request's pages go; does nothing for others."""
        part = self._parts.pop(request_id, None)
        if part is not None:
            part.lose()
            part.inlet.say(Drop(part.number))

    def expire(self, now: float) -> None:
        """Give up what has taken too long."""
        for part in list(self._parts.values()):
            late = part.due_s is not None and part.due_s <= now and part.state == "awaited"
            if late or part.expires_s <= now:
                part.lose()

    # On the link's thread

    def hears(self, inlet: Inlet, said: Frame | int) -> None:
        """Hear of pages that are held (by number), or of what rows have gathered."""
        number = said if isinstance(said, int) else -1 if said.block is None else said.block.request
        part = self._find(inlet, number)
        if part is None:
            return
        if isinstance(said, int):
            part.held()
            self._wake()
        elif said.block is not None:
            part.answered(said.block, said.payload)

    def lost(self, inlet: Inlet, number: int | None) -> None:
        """Hear that pages are held no more, or None: none that this link leads to."""
        for part in list(self._parts.values()):
            if part.inlet is inlet and number in (None, part.number):
                part.lose()

    def _find(self, inlet: Inlet, number: int) -> AfarPart | None:
        parts = list(self._parts.values())
        return next((p for p in parts if p.inlet is inlet and p.number == number), None)
