"""Pages on their way up from a tier: held, installed layer by layer, findable only when whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvkeep.cache.below import Below
from kvkeep.cache.radix import Page
from kvkeep.cache.store import PageStore
from kvkeep.cache.tiers import Install
from kvkeep.errors import EngineError
from kvkeep.sealing import SealContext


@dataclass(slots=True)
class _Incoming:
    """One page being installed."""

    page: Page
    key: bytes
    layers: set[int] = field(default_factory=set)
    arrived: bool | None = None


class Fetch:
    """Some pages of one chain being fetched.

    It holds them and the pages before them until `end`.
    """

    def __init__(
        self,
        store: PageStore,
        prefix: list[Page],
        parent: Callable[[], Page | None],
        pages: list[Page],
        keys: list[bytes],
    ) -> None:
        self.account = pages[0].account
        self.scope = pages[0].tag.scope
        self._store = store
        self._prefix = prefix
        self._parent = parent
        self._incoming = [_Incoming(page, key) for page, key in zip(pages, keys, strict=True)]
        self._next = 0
        self._over = False
        for page in prefix:
            store.lock(page)

    @property
    def done(self) -> bool:
        """Tell whether nothing more is to come: all pages are indexed, or one failed."""
        return self._over or self._next >= len(self._incoming)

    @property
    def installed_pages(self) -> int:
        """Return the pages that are whole and indexed."""
        return self._next

    def start(self, below: Below, wanted: tuple[SealContext, ...]) -> None:
        """Ask the tier for as many of these as there are pages, the first page first."""
        for entry, context in zip(self._incoming, wanted):
            if self._over:
                return
            below.fetch(context, self._installer(entry), self._finisher(entry))

    def give_up(self) -> None:
        """Index nothing more; what is still to come is ignored."""
        self._over = True

    def end(self) -> None:
        """Let go of all pages, deepest first."""
        self._over = True
        for entry in reversed(self._incoming):
            self._store.unlock(entry.page)
        for page in reversed(self._prefix):
            self._store.unlock(page)
        self._incoming, self._prefix = [], []

    def _installer(self, entry: _Incoming) -> Install:
        def install(layer: int, data: bytes | memoryview) -> None:
            if self._over or entry.arrived is not None:
                return
            try:
                count = self._store.pool.install(entry.page.slot, layer, data)
            except EngineError:
                self._finish(entry, False)
                return
            entry.layers.update(range(layer, layer + count))

        return install

    def _finisher(self, entry: _Incoming) -> Callable[[bool], None]:
        def done(ok: bool) -> None:
            whole = len(entry.layers) == self._store.pool.spec.num_layers
            self._finish(entry, ok and whole)

        return done

    def _finish(self, entry: _Incoming, ok: bool) -> None:
        if self._over or entry.arrived is not None:
            return
        entry.arrived = ok
        for first in self._incoming[self._next :]:
            if first.arrived is None:
                return
            if not first.arrived or not self._index(first):
                self._over = True
                return
            self._next += 1

    def _index(self, entry: _Incoming) -> bool:
        """Index a whole page below the one before it.

        An equal page that came first takes its place.
        """
        before = self._incoming[self._next - 1].page if self._next else None
        parent = self._parent() if before is None else before
        if parent is None or not parent.attached:
            return False
        twin = parent.children.get(entry.key)
        if twin is None:
            self._store.attach(parent, entry.page, entry.key)
            return True
        self._store.lock(twin)
        self._store.unlock(entry.page)
        entry.page = twin
        return True
