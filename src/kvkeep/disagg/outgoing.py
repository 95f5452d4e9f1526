"""One prompt on its way out: which layers of which pages were sent, and where the rest lies."""

from __future__ import annotations

from kvkeep.cache.hold import Hold
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.tiers import ClosedPage
from kvkeep.disagg.outlet import Batch, Outlet
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import DESCRIPTOR_BYTES, Block, Want
from kvkeep.engine.api import GenerateRequest
from kvkeep.types import PAGE_TOKENS


class Outgoing:
    """Pages [first, end) of a prompt, sent layer by layer as they close.

    What there is no room for when it closes is sent later from the cache, which holds it. A page's
    layers are sent in order, each once.
    """

    def __init__(
        self,
        want: Want,
        spec: GenerateRequest,
        manager: CacheManager,
        pages: PromptPages,
        outlet: Outlet,
        expires_s: float,
    ) -> None:
        self.want = want
        self.spec = spec
        self.outlet = outlet
        self.expires_s = expires_s
        self._manager = manager
        self._pages = pages
        self._first = want.first_page
        self._done = [0] * (want.end_page - want.first_page)
        """Of each page, its layers that were handed to the outlet."""
        self._gathering = _Gathered(want.request, pages)
        self._hold: Hold | None = None
        self._ended = False
        """Whether the request has: no page of it closes any more."""

    @property
    def done(self) -> bool:
        """Tell whether all was handed to the outlet."""
        return min(self._done) == self._pages.num_layers

    @property
    def waits(self) -> bool:
        """Tell whether nothing is to be sent before the prompt is computed, and it is not yet."""
        handover = self.spec.handover
        return handover is not None and handover.whole and not self._ended

    def closed(self, page: ClosedPage, layer: int) -> None:
        """Take a layer of a page that a step has just completed, and those before it.

        These closed before anyone had asked, or found no room.
        """
        tainted = page.view.tainted_from
        if tainted is not None and (page.index + 1) * PAGE_TOKENS > tainted:
            return
        at = page.index - self._first
        begun = self._done[at] if 0 <= at < len(self._done) else layer
        for earlier in range(begun, layer + 1):
            self._take(page.index, page.slot, earlier)

    def hold(self, *, ended: bool) -> None:
        """Hold what the cache has of the prompt so far; `ended`: nothing is added to that."""
        found = self._manager.match(
            self.spec.prompt_ids, account=self.spec.tenant, scope=self.spec.scope
        )
        hold = self._manager.holds.take(found)
        self.release()
        self._hold, self._ended = hold, ended

    def pump(self) -> None:
        """Hand over what lies in the cache, as far as there is room: the next turn may be late."""
        if not self._ended:
            self.hold(ended=False)  # pages that closed unasked for, or without room
        slots = [] if self._hold is None else self._hold.slots[self._first :]
        at = 0
        covered = min(len(slots), len(self._done))
        while at < covered:
            stop = at + 1
            while stop < covered and self._done[stop] == self._done[at]:
                stop += 1
            for layer in range(self._done[at], self._pages.num_layers):
                for page in range(at, stop):
                    if not self._take(self._first + page, slots[page], layer):
                        return
            at = stop

    def missing(self) -> int | None:
        """Return the first page that nothing is left to be sent of; None: it all comes."""
        covered = 0 if self._hold is None else len(self._hold.slots) - self._first
        if not self._ended:
            return None
        lost = (at for at, done in enumerate(self._done) if done < self._pages.num_layers)
        return next((self._first + at for at in lost if at >= covered), None)

    def flush(self) -> None:
        """Hand over what was gathered so far."""
        for batch in self._gathering.all():
            self.outlet.put(batch)

    def release(self) -> None:
        """Let go of the pages."""
        if self._hold is not None:
            self._hold.end()
            self._hold = None

    def _take(self, index: int, slot: int, layer: int) -> bool:
        """Copy a layer of a page where it is the next one and there is room; tell whether."""
        at = index - self._first
        if not 0 <= at < len(self._done) or self._done[at] != layer:
            return False
        size = self._pages.size(index, layer)
        if not self.outlet.has_room(size + self._gathering.size):
            return False
        for batch in self._gathering.add(index, layer, self._manager.pool.read(slot, layer)):
            self.outlet.put(batch)
        self._done[at] += 1
        return True


class _Gathered:
    """Layers of pages put together to blocks that are worth a frame."""

    def __init__(self, request: int, pages: PromptPages) -> None:
        self._request = request
        self._pages = pages
        self._start = (0, 0)
        self._columns = 0
        self._data: list[bytes] = []
        self.size = 0

    def add(self, page: int, layer: int, data: bytes) -> list[Batch]:
        """Take a layer of a page; return what it does not go with, or what is large enough."""
        ready: list[Batch] = []
        if self._data and not self._goes_on(page, layer):
            ready = self.all()
        if not self._data:
            self._start, self._columns = (page, layer), 0
        if layer == self._start[1]:  # it would not go on with one in a later row
            self._columns += 1
        self._data.append(data)
        self.size += len(data)
        return ready

    def all(self) -> list[Batch]:
        """Return everything: whole layers as one batch, and what is begun of another."""
        if not self._data:
            return []
        page, layer = self._start
        whole = len(self._data) // self._columns
        rest = len(self._data) % self._columns
        cut = whole * self._columns
        batches = [self._batch(page, layer, whole, self._columns, self._data[:cut])]
        if rest:
            batches.append(self._batch(page, layer + whole, 1, rest, self._data[cut:]))
        self._data, self.size = [], 0
        return batches

    def _goes_on(self, page: int, layer: int) -> bool:
        """Tell whether a layer of a page comes next in the block."""
        first, begun = self._start
        rows, column = divmod(len(self._data), self._columns)
        if column == 0 and self.size >= DESCRIPTOR_BYTES:
            return False
        if rows == 1 and column == 0 and (page, layer) == (first + self._columns, begun):
            return True
        return (page, layer) == (first + column, begun + rows)

    def _batch(self, page: int, layer: int, layers: int, pages: int, data: list[bytes]) -> Batch:
        block = Block(self._request, layer, layers, page, pages, self._pages.digest)
        return Batch(block, self._pages, tuple(data))
