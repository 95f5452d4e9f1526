"""Where a pool's tiles are: this machine's memory, or a device's."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.errors import ConfigError
from kvkeep.types import Int32Array

Tiles = NDArray[np.uint8]
"""[N, tile bytes]"""

TableShape = tuple[int, int, int]
"""Page slots, L, Hkv."""

_TOUCH_BYTES = 4096
"""The smallest page a machine maps."""

_ALIGN_BYTES = 2 << 20
"""A huge page; kernels need 64."""


@dataclass(frozen=True, slots=True)
class TileRange:
    """Tiles of one size, one after the other; a tile's id is its offset in units."""

    tile_bytes: int
    num_tiles: int
    first_byte: int
    unit_bytes: int

    @property
    def end_byte(self) -> int:
        """Return where the tiles end."""
        return self.first_byte + self.num_tiles * self.tile_bytes

    def holds(self, ids: Int32Array) -> NDArray[np.bool_]:
        """Tell which ids lie in the range."""
        inside: NDArray[np.bool_] = (ids >= self._first) & (
            ids < self._first + self.num_tiles * self._step
        )
        return inside

    def ids(self, numbers: Int32Array) -> Int32Array:
        """Return the ids of tiles by their number in the range."""
        found: Int32Array = (numbers * self._step + self._first).astype(np.int32)
        return found

    def numbers(self, ids: Int32Array) -> Int32Array:
        """Return the numbers in the range of tiles by their ids."""
        found: Int32Array = (ids - self._first) // self._step
        return found

    @property
    def _step(self) -> int:
        return self.tile_bytes // self.unit_bytes

    @property
    def _first(self) -> int:
        return self.first_byte // self.unit_bytes


class TileStorage(Protocol):
    """The bytes of all tiles; ids are checked by the pool, and those of one call are of one range.

    A range is named by its place in those the storage was made for.
    """

    buffer: torch.Tensor
    """[bytes] uint8"""
    device_table: torch.Tensor | None
    """The tile table where the kernels are, if that is not this machine's memory."""

    def place(self, slot: int, ids: Int32Array) -> None:
        """Note where the tiles [L, Hkv] of a page are that is handed out."""

    def zero(self, at: int, ids: Int32Array) -> None:
        """Zero tiles."""

    def copy(self, at: int, source: Int32Array, target: Int32Array) -> None:
        """Copy tiles to others."""

    def read(self, at: int, ids: Int32Array) -> Tiles:
        """Return tiles."""

    def write(self, at: int, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles as `read` returned them."""


StorageMaker = Callable[[Sequence[TileRange], TableShape], TileStorage]
"""Makes the storage of ranges of tiles that follow each other, for a tile table of a shape."""


class HostTiles:
    """Tiles in one mapping of this machine's memory, touched so that no request waits for it."""

    def __init__(
        self, ranges: Sequence[TileRange], table: TableShape, *, spare_bytes: int = 0
    ) -> None:
        """`spare_bytes` lie behind the tiles."""
        memory = _anonymous_bytes(ranges[-1].end_byte + spare_bytes)
        memory[::_TOUCH_BYTES] = 0
        self.buffer: torch.Tensor = torch.from_numpy(memory)
        self.device_table: torch.Tensor | None = None
        self._ranges = tuple(ranges)
        self._tiles: list[Tiles] = [
            memory[r.first_byte : r.end_byte].reshape(r.num_tiles, r.tile_bytes) for r in ranges
        ]

    def place(self, slot: int, ids: Int32Array) -> None:
        """Note nothing: kernels read the pool's own table."""

    def zero(self, at: int, ids: Int32Array) -> None:
        """Zero tiles."""
        self._tiles[at][self._span(at, ids)] = 0

    def copy(self, at: int, source: Int32Array, target: Int32Array) -> None:
        """Copy tiles to others."""
        tiles = self._tiles[at]
        tiles[self._span(at, target)] = tiles[self._span(at, source)]

    def read(self, at: int, ids: Int32Array) -> Tiles:
        """Return tiles."""
        return self._tiles[at][self._span(at, ids)]

    def write(self, at: int, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles as `read` returned them."""
        self._tiles[at][self._span(at, ids)] = tiles

    def _span(self, at: int, ids: Int32Array) -> slice | Int32Array:
        return _span(self._ranges[at].numbers(ids))


class DeviceTiles:
    """Tiles in a device's memory, with a copy of the tile table beside them."""

    def __init__(
        self, ranges: Sequence[TileRange], table: TableShape, device: torch.device
    ) -> None:
        size = ranges[-1].end_byte
        self._device = device
        try:
            self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"kv_cache_memory_bytes: the device lacks {size >> 20} MiB; lower it"
            ) from error
        self.device_table: torch.Tensor | None = torch.full(
            table, -1, dtype=torch.int32, device=device
        )
        self._ranges = tuple(ranges)
        self._tiles = [
            self.buffer[r.first_byte : r.end_byte].view(r.num_tiles, r.tile_bytes) for r in ranges
        ]
        self._table = self.device_table

    def place(self, slot: int, ids: Int32Array) -> None:
        """Copy the tiles [L, Hkv] of a page to the device's table."""
        self._table[slot] = torch.from_numpy(ids).to(self._device)

    def zero(self, at: int, ids: Int32Array) -> None:
        """Zero tiles."""
        self._tiles[at][self._index(at, ids)] = 0

    def copy(self, at: int, source: Int32Array, target: Int32Array) -> None:
        """Copy tiles to others."""
        tiles = self._tiles[at]
        tiles[self._index(at, target)] = tiles[self._index(at, source)]

    def read(self, at: int, ids: Int32Array) -> Tiles:
        """Return tiles, on this machine."""
        tiles: Tiles = self._tiles[at][self._index(at, ids)].cpu().numpy()
        return tiles

    def write(self, at: int, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles as `read` returned them."""
        rows = torch.from_numpy(np.array(tiles, np.uint8))
        self._tiles[at][self._index(at, ids)] = rows.to(self._device)

    def _index(self, at: int, ids: Int32Array) -> torch.Tensor | slice:
        span = _span(self._ranges[at].numbers(ids))
        if isinstance(span, slice):
            return span
        return torch.from_numpy(span.astype(np.int64)).to(self._device)


def _span(numbers: Int32Array) -> slice | Int32Array:
    """Return consecutive numbers as a slice, which is copied in one go."""
    if not len(numbers):
        return slice(0, 0)
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first == len(numbers) - 1 and bool((numbers[1:] - numbers[:-1] == 1).all()):
        return slice(first, last + 1)
    return numbers


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
