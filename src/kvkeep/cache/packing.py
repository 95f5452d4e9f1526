"""Tiles of a view's own: charged to its account like pages, held by it and its forks.

    page 0 | 1 2 .. end-1 | end ..        before: all locked
    page 0 | own tiles    | end ..        after: 1 .. end-1 stay cached where they were indexed

Pages that the index knows are evicted children first. So the pages from `end` on that it knows are
exchanged for copies: then nothing below those let go of is in use.
"""

from __future__ import annotations

import numpy as np

from kvkeep.cache.parts import Pages
from kvkeep.cache.store import PageStore
from kvkeep.cache.views import HeldView, OwnTiles
from kvkeep.types import Int32Array, View


class Packing:
    """Makes and resizes views' own tiles; knows nothing of what is in them."""

    def __init__(self, store: PageStore, held: dict[int, HeldView]) -> None:
        self._store = store
        self._held = held

    @property
    def pool(self) -> Pages:
        """Return where pages and tiles come from."""
        return self._store.pool

    def own_tail(self, view: View, end: int) -> None:
        """Exchange what the index knows from page `end` on for copies of the view's own.

        Raises `QuotaExceeded` or `PoolExhausted` before anything changes.
        """
        held = self._held[view.id]
        known = [i for i in range(end, len(held.pages)) if held.pages[i].attached]
        copies = self._store.new_pages(held.account, view.tag, len(known), at=end)
        for i, copy in zip(reversed(known), copies, strict=True):
            page = held.pages[i]
            self.pool.copy_page(page.slot, copy.slot)
            copy.state = page.state
            held.pages[i] = copy
            view.replace(i, copy.slot)
            self._store.unlock(page)

    def resize(self, view: View, need: Int32Array) -> Int32Array:
        """Return tile ids [n, L, Hkv] for `need` [L, Hkv] tiles, the first ones as they were.

        None are as they were if a fork holds them too. Raises `QuotaExceeded` or `PoolExhausted`
        before anything changes.
        """
        held = self._held[view.id]
        own = None if held.tiles is None or held.tiles.views > 1 else held.tiles
        old = np.zeros((0, *need.shape), np.int32)
        if own is not None and view.packed is not None:
            old = view.packed.tiles
        most = int(need.max(initial=0))
        table = np.full((max(most, len(old)), *need.shape), -1, np.int32)
        table[: len(old)] = old
        wanted = np.arange(len(table))[:, None, None] < need
        missing, surplus = wanted & (table < 0), ~wanted & (table >= 0)
        before = int((old >= 0).sum())
        after = before + int(missing.sum())
        table[missing] = self._take(held.account, before, after)
        dropped = table[surplus]
        self.pool.free_tiles(dropped)
        table[surplus] = -1
        self._charge(held.account, after, after - len(dropped))
        if own is None:
            self.drop(held)
        held.tiles = OwnTiles(held.account, table[table >= 0])
        return table[:most]

    def let_go(self, view: View, end: int) -> None:
        """Let go of pages before `end` but the first, deepest first; `own_tail` comes before."""
        held = self._held[view.id]
        for page in reversed(held.pages[held.gone : end]):
            self._store.unlock(page)
        held.gone = end

    def share(self, held: HeldView, twin: HeldView) -> None:
        """Let a fork hold what its source does."""
        twin.gone, twin.tiles = held.gone, held.tiles
        if held.tiles is not None:
            held.tiles.views += 1

    def drop(self, held: HeldView) -> None:
        """Let go of a view's tiles; the last of its forks frees them."""
        tiles, held.tiles = held.tiles, None
        if tiles is None:
            return
        tiles.views -= 1
        if not tiles.views:
            self.pool.free_tiles(tiles.ids)
            self._charge(tiles.account, len(tiles.ids), 0)

    def _take(self, account: str, before: int, after: int) -> Int32Array:
        """Take and charge the tiles by which a view grows."""
        self._store.make_room(account, self._pages(after) - self._pages(before))
        ids = self._store.take_tiles(account, after - before)
        self._charge(account, before, after)
        return ids

    def _charge(self, account: str, before: int, after: int) -> None:
        self._store.account(account).used_pages += self._pages(after) - self._pages(before)

    def _pages(self, tiles: int) -> int:
        """Return the pages that so many tiles count as."""
        return -(-tiles // self.pool.spec.tiles_per_page)
