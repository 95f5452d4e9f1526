"""Pages that a prefill worker holds for answers given elsewhere, and attends to for them.

It reads for a request what that request's own prompt finds in its own scope or among public pages,
and nothing else. A thread of its own attends: no step of the engine is waited for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch

from kvkeep.attention.apart import part_plan
from kvkeep.cache.hold import Hold as Pinned
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.matching import Match
from kvkeep.cache.pool import TilePool
from kvkeep.disagg.link import Faults
from kvkeep.disagg.outlet import Outlet, Reply
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import Block, Frame, Hold, Holds, Lost, rows_header
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import KvkeepError, unexpected
from kvkeep.ops import select
from kvkeep.ops.layout import LayerKV, PartOps
from kvkeep.types import PAGE_TOKENS, PUBLIC_SCOPE, Int32Array, Layout

ROWS: Final = 128
"""Most rows of a frame."""
WAITING: Final = 256
"""Most frames that wait to be attended for."""
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_JOIN_S: Final = 5.0


class Asked(NamedTuple):
    """A request's first pages, as its asker and its own prompt name them."""

    outlet: Outlet
    record: Hold
    spec: GenerateRequest
    manager: CacheManager
    pages: PromptPages
    expires_s: float


class Kept:
    """The first pages of one request."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.pinned: Pinned | None = None
        self.slots: Int32Array = np.zeros(0, np.int32)
        self.turn = threading.Lock()
        """Held by who reads the pages, and by who lets go of them."""


class Keeper:
    """All that one worker holds; but for `rows`, its engine's thread calls it."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._kept: dict[tuple[Outlet, int], Kept] = {}
        self._jobs: queue.SimpleQueue[tuple[Outlet, Frame] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.attended_rows = 0
        """Rows, counted per layer, that were attended to for other workers."""

    def __len__(self) -> int:
        """Return how many requests' pages are held or to be held."""
        return len(self._kept)

    def begin(self, core: EngineCore, engine: EngineOptions) -> None:
        """Take note of the engine, and start the thread."""
        info = core.info
        threads = max(1, (engine.threads or torch.get_num_threads()) // 2)
        ops = select(engine.kernel, threads, engine.device).parts
        assert ops is not None, "refused at start"
        self._ops: PartOps = ops
        self._shape = (core.num_heads, info.head_dim)
        self._dtype = DTYPES[info.dtype]
        self._layers: dict[CacheManager, list[LayerKV]] = {}
        for manager in core.caches.managers.values():
            pool = manager.pool
            if isinstance(pool, TilePool):
                layers = range(pool.spec.num_layers)
                self._layers[manager] = [pool.layer_kv(layer) for layer in layers]
        self._thread = threading.Thread(target=self._run, name="kvkeep-apart", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let go of everything, and end the thread."""
        self.end_where(lambda _: True)
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_JOIN_S)

    def ask(self, asked: Asked, *, ended: bool) -> None:
        """Hold a request's first pages, once its prompt is computed."""
        kept = Kept(asked)
        self._kept[asked.outlet, asked.record.request] = kept
        if ended:
            self._pin(kept)

    def computed(self, request_id: str) -> None:
        """Hear that a prompt is computed: nothing of it was evicted since."""
        for kept in list(self._kept.values()):
            if kept.asked.spec.id == request_id and kept.pinned is None:
                self._pin(kept)

    def end_where(self, ends: Callable[[Asked], bool], *, say: bool = False) -> None:
        """Let go of requests' pages, and with `say` tell their askers."""
        for key, kept in list(self._kept.items()):
            if not ends(kept.asked):
                continue
            del self._kept[key]
            with kept.turn:
                pinned, kept.pinned = kept.pinned, None
            if pinned is not None:
                pinned.end()
            if say:
                kept.asked.outlet.put(Lost(kept.asked.record.request, 0))

    def rows(self, outlet: Outlet, frame: Frame) -> None:
        """Attend for rows that came; from any thread.

        Rows that nobody attends for, and those of who sends more than are taken, are lost.
        """
        if self._thread is not None and self._jobs.qsize() < WAITING:
            self._jobs.put((outlet, frame))
        elif frame.block is not None:
            outlet.put(Lost(frame.block.request, 0))

    # Inside

    def _pin(self, kept: Kept) -> None:
        """Hold the pages where all of them are here and the request may read them."""
        asked = kept.asked
        spec, count = asked.spec, asked.record.pages
        prompt = spec.prompt_ids[: count * PAGE_TOKENS]
        match = asked.manager.match(
            np.array(prompt, np.int32), account=spec.tenant, scope=spec.scope
        )
        if readable(match, spec, asked.record.tag) < count:
            self.end_where(lambda one: one is asked, say=True)
            return
        kept.pinned = asked.manager.holds.take(match)
        kept.slots = np.array(kept.pinned.slots[:count], np.int32)
        asked.outlet.put(Holds(asked.record.request))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            outlet, frame = job
            block = frame.block
            if block is None:
                continue
            try:
                self._attend(outlet, block, frame.payload)
            except KvkeepError as error:
                self._refuse(outlet, block, error)
            except Exception as error:  # noqa: BLE001 - one request's rows, never the worker
                self._refuse(outlet, block, unexpected(error))

    def _refuse(self, outlet: Outlet, block: Block, why: object) -> None:
        self._faults.note("rows that can't attend", why)
        outlet.put(Lost(block.request, 0))

    def _attend(self, outlet: Outlet, block: Block, payload: memoryview) -> None:
        """Answer rows with their states; rows of what is not held are answered by `Lost`."""
        kept = self._kept.get((outlet, block.request))
        heads, dim = self._shape
        if kept is None or block.pages > ROWS or block.tag != kept.asked.pages.digest:
            outlet.put(Lost(block.request, 0))
            return
        asked = kept.asked
        layers, count = self._layers[asked.manager], asked.record.pages
        size = block.pages * heads * dim * self._dtype.itemsize
        raw = asked.pages.open_rows(block, count, payload, size, answer=False)
        q = torch.frombuffer(raw, dtype=self._dtype).view(block.pages, heads, dim)
        with kept.turn:
            if kept.pinned is None or block.layer >= len(layers):
                outlet.put(Lost(block.request, 0))
                return
            layout = Layout(asked.manager.pool.spec.layout)
            plan = part_plan(kept.slots, layout, block.pages)
            states = self._ops.attend_part(q, layers[block.layer], plan)
        self.attended_rows += block.pages
        answer = asked.pages.seal_rows(block, count, bytes_of(states), answer=True)
        outlet.put(Reply(rows_header(block, answer), answer))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, the last dimension's neighbours first."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def readable(match: Match, spec: GenerateRequest, tag: bytes) -> int:
    """Return how many leading pages of a match a request may read: public ones and its scope's.

    None of them where its asker means pages of another tag.
    """
    if match.tag.digest() != tag or match.account != spec.tenant:
        return 0
    pages = match.attached()
    scopes = (PUBLIC_SCOPE, spec.scope)
    return next((i for i, page in enumerate(pages) if page.tag.scope not in scopes), len(pages))
