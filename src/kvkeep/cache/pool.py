"""The memory of all pages: one mapping cut into tiles, and the tile table kernels read."""

from __future__ import annotations

import numpy as np
import torch

from kvkeep.cache.storage import HostTiles, StorageMaker, Tiles
from kvkeep.errors import ConfigError, EngineError, PoolExhausted
from kvkeep.ops.layout import LayerKV
from kvkeep.types import Int32Array, PageSpec


class FreeList:
    """A stack of free ids 0..count-1 with vectorised take and give back."""

    def __init__(self, count: int, what: str) -> None:
        self._what = what
        self._stack = np.arange(count, dtype=np.int32)
        self._used = np.zeros(count, np.bool_)
        self._free = count

    def __len__(self) -> int:
        return self._free

    def take(self, count: int) -> Int32Array:
        """Return `count` ids; raises `PoolExhausted` and takes none where fewer are free."""
        if count > self._free:
            raise PoolExhausted(f"no free {self._what}: {count} asked for, {self._free} left")
        self._free -= count
        ids = self._stack[self._free : self._free + count].copy()
        self._used[ids] = True
        return ids

    def give_back(self, ids: Int32Array) -> None:
        """Free ids; an id that is not in use, or named twice, is an `EngineError`."""
        if len(ids) == 0:
            return
        inside = int(ids.min()) >= 0 and int(ids.max()) < len(self._used)
        if not inside or not self._used[ids].all() or len(np.unique(ids)) != len(ids):
            raise EngineError(f"a {self._what} was freed that is not in use")
        self._used[ids] = False
        self._stack[self._free : self._free + len(ids)] = ids
        self._free += len(ids)

    def is_used(self, one: int) -> bool:
        """Tell whether an id is taken."""
        return 0 <= one < len(self._used) and bool(self._used[one])


class TilePool:
    """All tiles of one size, and the table [slots, L, Hkv] that says which of them make up a page.

    Bytes of a page or tile are zero when it is handed out: nothing of its last holder can be read,
    and rows not yet written are finite.
    """

    def __init__(self, spec: PageSpec, num_pages: int, storage: StorageMaker = HostTiles) -> None:
        if num_pages < 1:
            raise ConfigError(
                f"num_pages is {num_pages}; at least 1 is needed: give the cache more memory"
            )
        if spec.tile_bytes <= 0 or spec.tile_bytes % 64:
            raise ConfigError(
                f"tile_bytes is {spec.tile_bytes}; it must be a positive multiple of 64"
            )
        self.spec = spec
        self.num_pages = num_pages
        num_tiles = num_pages * spec.tiles_per_page
        self._storage = storage(spec, num_pages)
        self.buffer: torch.Tensor = self._storage.buffer
        self.tile_table: Int32Array = np.full(
            (num_pages, spec.num_layers, spec.num_kv_heads), -1, np.int32
        )
        self._slots = FreeList(num_pages, "page")
        self._holders = np.zeros(num_pages, np.int32)
        self._tiles = FreeList(num_tiles, "tile")
        self._layers = tuple(self._layer_kv(layer) for layer in range(spec.num_layers))

    @property
    def free_pages(self) -> int:
        """Return the pages that can still be handed out."""
        return min(len(self._slots), len(self._tiles) // self.spec.tiles_per_page)

    @property
    def free_tiles_count(self) -> int:
        """Return the tiles in no page and in no view."""
        return len(self._tiles)

    def alloc_page(self) -> int:
        """Return the slot of a zeroed page.

        Raises `PoolExhausted` and takes nothing where none is free.
        """
        tiles = self._tiles.take(self.spec.tiles_per_page)
        try:
            slot = int(self._slots.take(1)[0])
        except PoolExhausted:
            self._tiles.give_back(tiles)
            raise
        self.tile_table[slot] = tiles.reshape(self.spec.num_layers, self.spec.num_kv_heads)
        self._storage.place(slot, self.tile_table[slot])
        self._holders[slot] = 1
        return slot

    def hold_page(self, slot: int) -> None:
        """Add a holder to a page in use: it takes one `free_page` more until it is free."""
        self._require(slot)
        self._holders[slot] += 1

    def free_page(self, slot: int) -> None:
        """Let one holder go of a page; the last frees it and its tiles.

        Raises `EngineError` where the slot is not in use.
        """
        self._require(slot)
        self._holders[slot] -= 1
        if self._holders[slot]:
            return
        self._slots.give_back(np.array([slot], np.int32))
        self._tiles.give_back(self.tile_table[slot].ravel())
        self.tile_table[slot] = -1

    def alloc_tiles(self, count: int) -> Int32Array:
        """Return ids of zeroed tiles for a view of its own; raises `PoolExhausted`."""
        tiles = self._tiles.take(count)
        self._storage.zero(tiles)
        return tiles

    def free_tiles(self, ids: Int32Array) -> None:
        """Free tiles taken with `alloc_tiles`; raises `EngineError` where one is not in use."""
        self._tiles.give_back(ids)

    def copy_page(self, source: int, target: int) -> None:
        """Copy all bytes of one page to another."""
        self._require(source)
        self._require(target)
        self._storage.copy(self.tile_table[source].ravel(), self.tile_table[target].ravel())

    def read(self, slot: int, layer: int) -> bytes:
        """Return one layer of a page, its Hkv tiles in order."""
        self._require(slot)
        return self.read_tiles(slot, layer).tobytes()

    def read_tiles(self, slot: int, layer: int) -> Tiles:
        """Return one layer of a page, [Hkv, tile_bytes]; perhaps a view."""
        return self._storage.read(self.tile_table[slot, layer])

    def write_tiles(self, slot: int, layer: int, tiles: Tiles) -> None:
        """Write one layer of a page, [Hkv, tile_bytes]."""
        self._storage.write(self.tile_table[slot, layer], tiles)

    def install(self, slot: int, layer: int, data: bytes) -> None:
        """Write one layer of a page as `read` returned it.

        Raises `EngineError` where the size is wrong.
        """
        self._require(slot)
        heads, size = self.spec.num_kv_heads, self.spec.tile_bytes
        if len(data) != heads * size or not 0 <= layer < self.spec.num_layers:
            raise EngineError(
                f"layer {layer} with {len(data)} bytes does not fit a page of this pool"
            )
        rows = np.frombuffer(data, np.uint8).reshape(heads, size)
        self.write_tiles(slot, layer, rows)

    def layer_kv(self, layer: int) -> LayerKV:
        """Return what kernels need for one layer; the same object every time."""
        return self._layers[layer]

    def _layer_kv(self, layer: int) -> LayerKV:
        spec = self.spec
        return LayerKV(
            self.buffer,
            self.tile_table,
            spec.tile_bytes,
            layer,
            spec.num_kv_heads,
            spec.head_dim,
            self._storage.device_table,
        )

    def _require(self, slot: int) -> None:
        if not self._slots.is_used(slot):
            raise EngineError(f"page slot {slot} is not in use")
