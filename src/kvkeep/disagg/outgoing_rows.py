"""Rows behind prompts' last whole pages, kept from the step that computed them until they are sent.

No cache holds them: a worker that asks too late, or for more than is kept, computes them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvkeep.cache.tiers import OpenRows
from kvkeep.disagg.outlet import Batch, Outlet
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import DESCRIPTOR_BYTES, Kind, Lost, WantRows
from kvkeep.engine.api import GenerateRequest

MOST_BYTES: Final = 256 << 20
"""Kept and not yet sent; what exceeds it is computed again where it is answered."""


class RowsWish(NamedTuple):
    """Who asks for a prompt's rows, and what both sides call them."""

    outlet: Outlet
    want: WantRows
    spec: GenerateRequest
    pages: PromptPages
    expires_s: float

    def is_of(self, outlet: Outlet, request: int) -> bool:
        """Tell whether it is an asker's request of this number."""
        return self.outlet is outlet and self.want.request == request


@dataclass(slots=True)
class _Leaving:
    """One prompt's rows: what its steps have stored, and what of that was sent."""

    spec: GenerateRequest
    tag: bytes = b""
    layers: list[bytes] = field(default_factory=list)
    wishes: list[RowsWish] = field(default_factory=list)
    sent: int = 0
    forgotten_s: float | None = None
    """When nobody may ask any more, once the prompt is computed."""

    @property
    def size(self) -> int:
        """Return the bytes that are kept."""
        return sum(map(len, self.layers))


class OutgoingRows:
    """All rows on their way out of one worker; its engine's thread calls it."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._leaving: dict[str, _Leaving] = {}

    def __len__(self) -> int:
        """Return how many prompts' rows are kept or asked for."""
        return len(self._leaving)

    def ask(self, wish: RowsWish, *, ended: bool) -> None:
        """Send a prompt's rows as they are there; `ended`: no step computes them any more."""
        if ended and wish.spec.id not in self._leaving:
            wish.outlet.put(Lost(wish.want.request, 0))
            return
        leaving = self._leaving.setdefault(wish.spec.id, _Leaving(wish.spec))
        leaving.wishes.append(wish)
        if ended:
            self._settle(leaving)
        self._pump(leaving)

    def stored(self, spec: GenerateRequest, rows: OpenRows, layer: int, data: bytes) -> None:
        """Keep rows of a layer and send what is worth a frame; without room let go of them all."""
        if not layer:
            self._leaving.setdefault(spec.id, _Leaving(spec))
        leaving = self._leaving.get(spec.id)
        if leaving is None or layer != len(leaving.layers):
            return  # there is no use in the rest of what was let go of
        if sum(one.size for one in self._leaving.values()) + len(data) > self._most_bytes:
            leaving.layers = []
            return
        leaving.tag = rows.tag.digest()
        leaving.layers.append(data)
        self._pump(leaving)

    def computed(self, request_id: str, forgotten_s: float) -> None:
        """Hear that a prompt is computed: nothing is added to what is kept of it."""
        leaving = self._leaving.get(request_id)
        if leaving is not None:
            leaving.forgotten_s = forgotten_s
            self._settle(leaving)

    def pump(self, now: float) -> None:
        """Send what there is room for, and forget what nobody has asked for in time."""
        for leaving in list(self._leaving.values()):
            self._pump(leaving)
            late = leaving.forgotten_s is not None and leaving.forgotten_s <= now
            if (late and not leaving.wishes) or self._is_done(leaving):
                del self._leaving[leaving.spec.id]

    def end_where(self, ends: Callable[[RowsWish], bool]) -> None:
        """Send nothing more to such askers, say so, and keep nothing for them."""
        for leaving in list(self._leaving.values()):
            gone = [one for one in leaving.wishes if ends(one)]
            for wish in gone:
                self._lose(leaving, wish)
            if gone and not leaving.wishes:
                del self._leaving[leaving.spec.id]

    def forget(self, forgets: Callable[[GenerateRequest], bool]) -> None:
        """Let go of such prompts' rows."""
        for leaving in list(self._leaving.values()):
            if forgets(leaving.spec):
                for wish in list(leaving.wishes):
                    self._lose(leaving, wish)
                del self._leaving[leaving.spec.id]

    # Inside

    def _settle(self, leaving: _Leaving) -> None:
        """Tell those whose rows do not come: layers are missing, or they have another form."""
        for wish in list(leaving.wishes):
            whole = len(leaving.layers) == wish.pages.num_layers
            if not whole or wish.want.tag != leaving.tag:
                self._lose(leaving, wish)

    def _lose(self, leaving: _Leaving, wish: RowsWish) -> None:
        leaving.wishes.remove(wish)
        wish.outlet.drop(wish.want.request)
        wish.outlet.put(Lost(wish.want.request, 0))

    def _is_done(self, leaving: _Leaving) -> bool:
        return any(leaving.sent == one.pages.num_layers for one in leaving.wishes)

    def _pump(self, leaving: _Leaving) -> None:
        """Send layers to the one who asked for rows of this form, whole frames of them."""
        wish = next((one for one in leaving.wishes if one.want.tag == leaving.tag), None)
        handover, ended = leaving.spec.handover, leaving.forgotten_s is not None
        if wish is None or (handover is not None and handover.whole and not ended):
            return
        while leaving.sent < len(leaving.layers):
            size, stop = 0, leaving.sent
            while stop < len(leaving.layers) and size < DESCRIPTOR_BYTES:
                size += len(leaving.layers[stop])
                stop += 1
            last = stop == wish.pages.num_layers
            if not (last or size >= DESCRIPTOR_BYTES) or not wish.outlet.has_room(size):
                return
            block = wish.pages.open_block(wish.want.request, leaving.sent, stop - leaving.sent)
            data = tuple(leaving.layers[leaving.sent : stop])
            wish.outlet.put(Batch(block, wish.pages, data, Kind.OPEN))
            leaving.layers[leaving.sent : stop] = [b""] * (stop - leaving.sent)
            leaving.sent = stop
