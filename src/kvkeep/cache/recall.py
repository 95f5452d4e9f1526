"""Public pages below memory: they go down and come up at epochs' ends, by the snapshot alone.

What is public for the first time is announced to the tier at that epoch's end, under keys and a
quota of its own, with the tokens it stands for: promotion's state knows chains and no text. What
a snapshot names and nobody holds in memory is fetched from one epoch's end to the next, and is
public from there on if the snapshot still names it. No request starts either.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Final

from kvkeep.cache.below import CHAIN_BYTES, Below
from kvkeep.cache.radix import Page, path_to
from kvkeep.cache.store import PUBLIC_ACCOUNT, PageStore
from kvkeep.cache.tiers import Install
from kvkeep.errors import EngineError
from kvkeep.types import PageKind, PageTag, chain_hash

LOOKED_AT: Final = 1024
"""Chains asked for at one epoch's end, the first of the snapshot."""


def hang(store: PageStore, tag: PageTag, page: Page, key: bytes, parent: Page | None) -> None:
    """Index a held page in the public tree, and let go of it as used after all above it."""
    index = store.index
    above = [] if parent is None else path_to(parent)
    page.since_s = store.now
    root = index.root(index.model_digest, PUBLIC_ACCOUNT, tag)
    store.attach(above[-1] if above else root, page, key)
    for one in above:
        store.lock(one)
    for one in (page, *reversed(above)):
        store.unlock(one)


@dataclass(slots=True)
class _Incoming:
    """One page on its way up."""

    page: Page
    parent: bytes = b""
    key: bytes = b""
    layers: set[int] = field(default_factory=set)
    whole: bool | None = None
    """None: it is on its way."""


class Recall:
    """The public pages of one cache and its tier."""

    def __init__(self, store: PageStore, below: Below, tag: PageTag) -> None:
        self._store = store
        self._below = below
        self._tag = tag
        self._digest = tag.digest()
        self._down: set[bytes] = set()
        self._incoming: dict[bytes, _Incoming] = {}

    def arrive(self, named: Container[bytes]) -> None:
        """Publish what has come since the last epoch's end and is still named; drop the rest."""
        store = self._store
        for chain, one in self._incoming.items():
            public = store.index.public_pages
            parent = public.get(one.parent)
            first = one.parent == store.index.model_digest
            wanted = one.whole and chain in named and chain not in public
            if wanted and (first or parent is not None):
                hang(store, self._tag, one.page, one.key, parent)
                self._down.add(chain)
            else:
                store.unlock(one.page)
        self._incoming = {}

    def settle(self, named: Iterable[bytes]) -> None:
        """Announce what is newly public; begin to fetch what is named and not in memory."""
        public = self._store.index.public_pages
        self._down &= public.keys()
        for chain, page in public.items():
            if chain not in self._down and not page.pinned:
                self._down.add(chain)
                self._below.publish(page)
        missing = [chain for chain in named if chain not in public]
        for chain in missing[:LOOKED_AT]:
            if self._store.share(PUBLIC_ACCOUNT).is_full(first=False):
                return
            self._fetch(chain)

    def _fetch(self, chain: bytes) -> None:
        context = self._below.find_public(self._tag, chain)
        if context is None:
            return
        first = context.kind is PageKind.FIRST
        if self._store.share(PUBLIC_ACCOUNT).is_full(first=first):
            return
        (page,) = self._store.new_pages(PUBLIC_ACCOUNT, self._tag, 1, at=0 if first else 1)
        one = self._incoming[chain] = _Incoming(page)
        self._below.fetch_public(context, self._installer(chain, one), self._finisher(one))

    def _installer(self, chain: bytes, one: _Incoming) -> Install:
        def install(layer: int, data: bytes | memoryview) -> None:
            if self._incoming.get(chain) is not one:
                return
            if layer == 0:
                end = self._below.meta_bytes
                parent, key = bytes(data[:CHAIN_BYTES]), bytes(data[CHAIN_BYTES:end])
                if chain_hash(parent, self._digest, key) == chain:
                    one.parent, one.key = parent, key
                layer, data = 1, data[end:]
                if not data:
                    return
            try:
                count = self._store.pool.install(one.page.slot, layer - 1, data)
            except EngineError:
                return
            one.layers.update(range(layer - 1, layer - 1 + count))

        return install

    def _finisher(self, one: _Incoming) -> Callable[[bool], None]:
        def done(ok: bool) -> None:
            whole = len(one.layers) == self._store.pool.spec.num_layers
            one.whole = ok and whole and bool(one.key)

        return done
