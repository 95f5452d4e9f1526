"""A part of a pool: the pages of one form, where a pool holds several."""

from __future__ import annotations

from kvkeep.cache.pool import TilePool
from kvkeep.cache.storage import Tiles
from kvkeep.types import Int32Array, PageKind, PageSpec


class PoolPart:
    """Pages kept in the model's dtype beside coded ones, as a pool of their own."""

    def __init__(self, pool: TilePool, spec: PageSpec) -> None:
        self.spec = spec
        self.num_pages = pool.num_of(PageKind.KEPT)
        self.num_first = 0
        self.hold_page, self.free_page, self.copy_page = (
            pool.hold_page,
            pool.free_page,
            pool.copy_page,
        )
        self.read, self.read_page, self.install = pool.read, pool.read_page, pool.install
        self.holders, self.prove = pool.holders, pool.prove
        self.tile_table = pool.tile_table
        self._pool = pool

    @property
    def free_pages(self) -> int:
        """Return the pages that can still be handed out."""
        return self._pool.free_of(PageKind.KEPT)

    def free_of(self, kind: PageKind) -> int:
        """Return the same: all pages are of one kind."""
        return self.free_pages

    def alloc_page(self, kind: PageKind = PageKind.PLAIN) -> int:
        """Return the slot of a zeroed page; raises `PoolExhausted` where none is free."""
        return self._pool.alloc_page(PageKind.KEPT)

    def alloc_tiles(self, count: int, layer: int = 0, head: int = 0) -> Int32Array:
        """Return ids of zeroed tiles for a view of its own; raises `PoolExhausted`."""
        return self._pool.alloc_tiles(count, layer, head, kind=PageKind.KEPT)

    def free_tiles(self, ids: Int32Array) -> None:
        """Free tiles taken with `alloc_tiles`."""
        self._pool.free_tiles(ids, PageKind.KEPT)

    def read_ids(self, ids: Int32Array) -> Tiles:
        """Return tiles by their ids; perhaps a view."""
        return self._pool.read_ids(ids)

    def write_ids(self, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles by their ids."""
        self._pool.write_ids(ids, tiles)


Pages = TilePool | PoolPart
"""Where a cache manager's pages come from."""
