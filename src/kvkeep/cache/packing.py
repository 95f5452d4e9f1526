"""Tiles of a view's own: charged to its account like pages, held by it and its forks.

    page 0 | 1 2 .. end-1 | end ..        before: all locked
    page 0 | own tiles    | end ..        after: 1 .. end-1 stay cached where they were indexed

Pages that the index knows are evicted children first. So the pages from `end` on that it knows are
exchanged for copies, and tokens are moved from the end on, a few pages at a time: nothing below
what was let go of is in use, so what is written next can take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvkeep.cache.parts import Pages
from kvkeep.cache.radix import Page
from kvkeep.cache.store import PageStore
from kvkeep.cache.views import HeldView, OwnTiles
from kvkeep.errors import QuotaExceeded
from kvkeep.types import Int32Array, PageKind, View
from kvkeep.watch import Packed

Bools = NDArray[np.bool_]


Cuts = Sequence[tuple[int, Bools]]
"""From which page on a view lets go, one after the other, once tiles [n, L, Hkv] are written."""


@dataclass(slots=True)
class Moving:
    """A view whose live tokens are being moved."""

    view: View
    held: HeldView
    end: int
    """Pages from there on were let go of already, or stay."""
    table: Int32Array
    """[n, L, Hkv] tile ids so far."""
    missing: Bools
    """[n, L, Hkv] where new tiles are taken."""
    old: Bools
    """[m, L, Hkv] tiles that it alone held before; m = 0 where forks hold them too."""
    given_up: Int32Array
    first: int
    """Pages before it, but the first, are gone since earlier."""
    pages: int = 0
    """That its tiles count as so far."""

    def grown(self, fresh: Bools) -> Bools:
        """Return [n + m, L, Hkv] all tiles that are held once `fresh` ones are."""
        return np.concatenate([fresh | (self.missing & (self.table >= 0)), self.old])

    def tail(self) -> list[int]:
        """Return the pages after those that move which the index knows, the last one first."""
        pages = self.held.pages
        return [i for i in reversed(range(self.end, len(pages))) if pages[i].attached]

    def leaving(self, begin: int) -> list[Page]:
        """Return the pages from `begin` on that are to be let go of."""
        return self.held.pages[max(begin, self.first) : self.end]


class Packing:
    """Makes and resizes views' own tiles; knows nothing of what is in them."""

    def __init__(self, store: PageStore, held: dict[int, HeldView]) -> None:
        self._store = store
        self._held = held

    @property
    def pool(self) -> Pages:
        """Return where pages and tiles come from."""
        return self._store.pool

    def begin(self, view: View, end: int, stays: Int32Array, cuts: Cuts) -> Moving:
        """Begin to move what is left of pages 1 to `end` - 1, in the steps that `cuts` says.

        Of its tiles some `stays` [n, L, Hkv] as they are: these are named by their place in the
        view's own; -1 is a new one, -2 none. A tile that a fork holds too stays by its content: a
        new one stands for it. Other new tiles of a head may be tiles it gives up. Raises
        `QuotaExceeded` before anything changes; what follows finds room.
        """
        held = self._held[view.id]
        own = None if held.tiles is None or held.tiles.views > 1 else held.tiles
        old = np.zeros((0, *stays.shape[1:]), np.int32)
        if own is not None and view.packed is not None:
            old = view.packed.tiles
        table, missing, given_up = _assigned(old, stays)
        moving = Moving(view, held, end, table, missing, old >= 0, given_up, held.gone)
        moving.pages = self._pages(moving.old)
        self._check_room(moving, cuts)
        self._own_tail(moving)
        return moving

    def take(self, moving: Moving, wanted: Bools) -> None:
        """Take the tiles that are missing where `wanted` [n, L, Hkv]."""
        fresh = wanted & (moving.table < 0)
        pages = self._pages(moving.grown(fresh))
        self._store.make_room(moving.held.account, pages - moving.pages)
        moving.table[fresh] = self._store.take_tiles(moving.held.account, fresh)
        self._charge(moving.held.account, pages - moving.pages)
        moving.pages = pages

    def let_go(self, moving: Moving, begin: int) -> None:
        """Let go of what is held from page `begin` on of those that move, deepest first."""
        for page in reversed(moving.leaving(begin)):
            self._store.unlock(page)
        moving.end = begin

    def finish(self, moving: Moving, end: int) -> Packed:
        """Free what is given up and hold the tiles instead of pages 1 to `end` - 1."""
        held, there = moving.held, moving.table >= 0
        self.pool.free_tiles(moving.given_up)
        self._charge(held.account, self._pages(there) - moving.pages)
        if not len(moving.old):
            self.drop(held)
        held.tiles = OwnTiles(held.account, moving.table[there], self._pages(there))
        held.gone = end
        return Packed(moving.table, end)

    def _own_tail(self, moving: Moving) -> None:
        """Exchange what the index knows from the end on for copies, one by one."""
        held, view = moving.held, moving.view
        for i in moving.tail():
            page = held.pages[i]
            (copy,) = self._store.new_pages(held.account, view.tag, 1, at=i)
            self.pool.copy_page(page.slot, copy.slot)
            copy.state = page.state
            held.pages[i] = copy
            view.replace(i, copy.slot)
            self._store.unlock(page)

    def _check_room(self, moving: Moving, cuts: Cuts) -> None:
        """Raise `QuotaExceeded` where a step would find none: what is let go of makes some.

        A page whose memory others hold too gives back its place in the share alone.
        """
        owner = self._store.account(moving.held.account)
        unused = [page for page in owner.unreferenced if page.kind is PageKind.PLAIN]
        share = owner.room_pages
        memory = self.pool.free_of(PageKind.PLAIN) + self._alone(unused)
        steps = [(1, [moving.held.pages[i]]) for i in moving.tail()]
        pages, end, taken = moving.pages, moving.end, np.zeros_like(moving.missing)
        for begin, wanted in cuts:
            taken |= wanted & moving.missing
            now = self._pages(moving.grown(taken))
            steps.append((now - pages, moving.held.pages[max(begin, moving.first) : end]))
            pages, end = now, begin
        for count, gone in steps:
            if count > min(share, memory):
                raise QuotaExceeded(
                    f"account {owner.name!r} needs {count} more pages to pack a sequence; there is"
                    f" room for {max(min(share, memory), 0)}"
                )
            free = [page for page in gone if page.ref_count == 1 and page.account == owner.name]
            share += len(free) - count
            memory += self._alone(free) - count

    def _alone(self, pages: Sequence[Page]) -> int:
        """Return how many pages are the only holders of their memory."""
        return sum(self.pool.holders(page.slot) == 1 for page in pages)

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
            self._charge(tiles.account, -tiles.pages)

    def _charge(self, account: str, pages: int) -> None:
        self._store.account(account).used_pages += pages

    def _pages(self, tiles: Bools) -> int:
        """Return the pages that tiles [n, L, Hkv] count as."""
        return self.pool.spec.pages_of(tiles)


def _assigned(old: Int32Array, stays: Int32Array) -> tuple[Int32Array, Bools, Int32Array]:
    """Return ids for tiles, where some are missing, and which of the old [m, L, Hkv] are left."""
    table = np.full(stays.shape, -1, np.int32)
    if not len(old):
        return table, stays >= -1, np.zeros(0, np.int32)
    free = old >= 0
    for at in np.ndindex(stays.shape[1:]):
        column, mine = stays[:, *at], free[:, *at]
        kept = np.flatnonzero(column >= 0)
        table[kept, *at] = old[column[kept], *at]
        mine[column[kept]] = False
        spare = np.flatnonzero(mine)
        new = np.flatnonzero(column == -1)[: len(spare)]
        spare = spare[: len(new)]
        table[new, *at] = old[spare, *at]
        mine[spare] = False
    return table, (stays >= -1) & (table < 0), old[free]
