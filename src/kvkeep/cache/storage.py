"""Where a pool's tiles are: this machine's memory, or a device's."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.errors import ConfigError
from kvkeep.types import Int32Array, PageSpec

Tiles = NDArray[np.uint8]
"""[N, tile_bytes]"""

_TOUCH_BYTES = 4096
"""The smallest page a machine maps."""

_ALIGN_BYTES = 2 << 20
"""A huge page; kernels need 64."""


class TileStorage(Protocol):
    """The bytes of all tiles; ids are checked by the pool."""

    buffer: torch.Tensor
    """[bytes] uint8"""
    device_table: torch.Tensor | None
    """The tile table where the kernels are, if that is not this machine's memory."""

    def place(self, slot: int, tiles: Int32Array) -> None:
        """Zero the tiles [L, Hkv] of a page that is handed out, and note where they are."""

    def zero(self, ids: Int32Array) -> None:
        """Zero tiles."""

    def copy(self, source: Int32Array, target: Int32Array) -> None:
        """Copy tiles to others."""

    def read(self, ids: Int32Array) -> Tiles:
        """Return tiles."""

    def write(self, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles as `read` returned them."""


StorageMaker = Callable[[PageSpec, int], TileStorage]
"""Makes the storage of a spec's tiles for so many pages."""


class HostTiles:
    """Tiles in one mapping of this machine's memory, touched so that no request waits for it."""

    def __init__(self, spec: PageSpec, num_pages: int) -> None:
        count = num_pages * spec.tiles_per_page
        memory = _anonymous_bytes(count * spec.tile_bytes)
        memory[::_TOUCH_BYTES] = 0
        self.buffer: torch.Tensor = torch.from_numpy(memory)
        self.device_table: torch.Tensor | None = None
        self._tiles: Tiles = memory.reshape(count, spec.tile_bytes)

    def place(self, slot: int, tiles: Int32Array) -> None:
        """Zero the tiles [L, Hkv] of a page; kernels read the pool's own table."""
        self.zero(tiles.ravel())

    def zero(self, ids: Int32Array) -> None:
        """Zero tiles."""
        self._tiles[_span(ids)] = 0

    def copy(self, source: Int32Array, target: Int32Array) -> None:
        """Copy tiles to others."""
        self._tiles[_span(target)] = self._tiles[_span(source)]

    def read(self, ids: Int32Array) -> Tiles:
        """Return tiles."""
        return self._tiles[_span(ids)]

    def write(self, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles as `read` returned them."""
        self._tiles[ids] = tiles


class DeviceTiles:
    """Tiles in a device's memory, with a copy of the tile table beside them."""

    def __init__(self, spec: PageSpec, num_pages: int, device: torch.device) -> None:
        count = num_pages * spec.tiles_per_page
        self._device = device
        try:
            self.buffer = torch.zeros(count * spec.tile_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"kv_cache_memory_bytes: the device lacks {count * spec.tile_bytes >> 20} MiB; "
                "lower it"
            ) from error
        shape = (num_pages, spec.num_layers, spec.num_kv_heads)
        self.device_table: torch.Tensor | None = torch.full(
            shape, -1, dtype=torch.int32, device=device
        )
        self._tiles = self.buffer.view(count, spec.tile_bytes)
        self._table = self.device_table

    def place(self, slot: int, tiles: Int32Array) -> None:
        """Zero the tiles [L, Hkv] of a page and copy them to the device's table."""
        self.zero(tiles.ravel())
        self._table[slot] = torch.from_numpy(tiles).to(self._device)

    def zero(self, ids: Int32Array) -> None:
        """Zero tiles."""
        self._tiles[self._index(ids)] = 0

    def copy(self, source: Int32Array, target: Int32Array) -> None:
        """Copy tiles to others."""
        self._tiles[self._index(target)] = self._tiles[self._index(source)]

    def read(self, ids: Int32Array) -> Tiles:
        """Return tiles, on this machine."""
        tiles: Tiles = self._tiles[self._index(ids)].cpu().numpy()
        return tiles

    def write(self, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles as `read` returned them."""
        rows = torch.from_numpy(np.array(tiles, np.uint8))
        self._tiles[self._index(ids)] = rows.to(self._device)

    def _index(self, ids: Int32Array) -> torch.Tensor | slice:
        span = _span(ids)
        if isinstance(span, slice):
            return span
        return torch.from_numpy(ids.astype(np.int64)).to(self._device)


def _span(ids: Int32Array) -> slice | Int32Array:
    """Return consecutive ids as a slice, which is copied in one go."""
    if not len(ids):
        return slice(0, 0)
    first, last = int(ids[0]), int(ids[-1])
    if last - first == len(ids) - 1 and bool((ids[1:] - ids[:-1] == 1).all()):
        return slice(first, last + 1)
    return ids


def _anonymous_bytes(size: int) -> NDArray[np.uint8]:
    try:
        memory = mmap.mmap(-1, size + _ALIGN_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"the cache asks for {size >> 20} MiB that are not there: lower its share of memory"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    start = -int(raw.ctypes.data) % _ALIGN_BYTES
    return raw[start : start + size]
