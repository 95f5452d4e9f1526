"""Tiles that are sealed while nobody attends to them, and a scratch where they are open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvkeep.cache.storage import HostTiles, TableShape, TileRange, Tiles
from kvkeep.errors import SealError
from kvkeep.types import Int32Array, UInt64Array

PAGE_BYTES: Final = 4096

Lock = Callable[[int, int], bool]
"""Keeps memory, by address and size, out of swap and dumps; False where it may be swapped."""


class Cipher(Protocol):
    """Seals tiles of one size; see `shield.tiles.TileCipher`."""

    tag_bytes: int

    def seal(
        self, plain: Sequence[memoryview], tiles: Tiles, tags: Tiles, numbers: Int32Array
    ) -> UInt64Array:
        """Write plain tiles sealed to tiles and tags at `numbers`; return the nonces' counts."""

    def open(
        self,
        tiles: Tiles,
        tags: Tiles,
        counts: UInt64Array,
        numbers: Int32Array,
        into: Sequence[memoryview],
    ) -> list[int]:
        """Open tiles into memory for each; return which of them were changed."""


class SealedTiles(HostTiles):
    """Tiles of this machine's memory that are sealed in place, tags and counts beside them.

    What is written whole is sealed at once. What kernels append to is plain until `seal`, and is
    zeroed when it is freed. A copy of a sealed tile is the same ciphertext under the same nonce.
    """

    def __init__(
        self,
        ranges: Sequence[TileRange],
        table: TableShape,
        *,
        cipher: Cipher,
        scratch_bytes: int,
        lock: Lock = lambda _address, _size: False,
    ) -> None:
        """`scratch_bytes`: of tiles that are open at a time, behind all others."""
        step = math.lcm(ranges[0].unit_bytes, PAGE_BYTES)
        first = -(-ranges[-1].end_byte // step) * step
        self._scratch_first = first // ranges[0].unit_bytes
        self._unit = ranges[0].unit_bytes
        super().__init__(ranges, table, spare_bytes=first - ranges[-1].end_byte + scratch_bytes)
        self._cipher = cipher
        self._counts = [np.zeros(r.num_tiles, np.uint64) for r in ranges]
        """Of each tile's nonce; 0: it is plain."""
        self._tags = [np.zeros((r.num_tiles, cipher.tag_bytes), np.uint8) for r in ranges]
        memory = self.buffer.numpy()
        self._scratch = memory[first:]
        self._scratch_view = self._scratch.data
        self._used = 0
        self.locked = lock(int(self._scratch.ctypes.data), len(self._scratch))
        """Whether what is open is kept out of swap."""

    @property
    def scratch_bytes(self) -> int:
        """Return what may be open at a time."""
        return len(self._scratch)

    def zero(self, at: int, ids: Int32Array) -> None:
        """Zero tiles; they are plain."""
        super().zero(at, ids)
        self._counts[at][self._span(at, ids)] = 0

    def drop(self, at: int, ids: Int32Array) -> None:
        """Zero what is plain of tiles that are freed."""
        numbers = self._ranges[at].numbers(ids)
        self._tiles[at][numbers[self._counts[at][numbers] == 0]] = 0

    def copy(self, at: int, source: Int32Array, target: Int32Array) -> None:
        """Copy tiles to others, sealed or not."""
        super().copy(at, source, target)
        for beside in (self._counts[at], self._tags[at]):
            beside[self._span(at, target)] = beside[self._span(at, source)]

    def read(self, at: int, ids: Int32Array) -> Tiles:
        """Return tiles in the clear, in memory of their own; raises `SealError`."""
        numbers = self._ranges[at].numbers(ids)
        found: Tiles = self._tiles[at][numbers]
        sealed = np.flatnonzero(self._counts[at][numbers])
        if self._open(at, numbers[sealed], [found[i].data for i in sealed.tolist()]):
            found.fill(0)
            raise SealError("a tile in memory was changed")
        return found

    def write(self, at: int, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles as `read` returned them, sealed."""
        if len(ids):
            self._seal(at, self._ranges[at].numbers(ids), np.ascontiguousarray(tiles))

    def seal(self, at: int, ids: Int32Array) -> None:
        """Seal tiles where they are, those that are not sealed."""
        numbers = self._ranges[at].numbers(ids)
        numbers = numbers[self._counts[at][numbers] == 0]
        if len(numbers):
            self._seal(at, numbers, (self._tiles[at][number] for number in numbers.tolist()))

    def prove(self, at: int, ids: Int32Array) -> None:
        """Raise `SealError` where a tile was changed since it was sealed."""
        self.read(at, ids).fill(0)

    def open(self, ids: Int32Array, place: int) -> tuple[Int32Array, NDArray[np.bool_], int]:
        """Open sealed tiles [n] into the scratch from byte `place` on.

        Returns ids [n] of the open ones, or of those that are plain where they are; which were
        changed, all zeros now; and the end of what is used. -1 stays so.
        """
        opened, changed = ids.copy(), np.zeros(len(ids), np.bool_)
        for at, own in enumerate(self._ranges):
            of_range = np.flatnonzero(own.holds(ids) & (ids >= 0))
            numbers = own.numbers(ids[of_range])
            sealed = self._counts[at][numbers] != 0
            of_range, numbers = of_range[sealed], numbers[sealed]
            size, count = own.tile_bytes, len(numbers)
            end = place + count * size
            if end > len(self._scratch):
                raise SealError("more tiles were to be opened than the scratch holds")
            view = self._scratch_view
            self._used = max(self._used, end)
            broken = self._open(at, numbers, [view[i : i + size] for i in range(place, end, size)])
            changed[of_range[broken]] = True
            step = size // self._unit
            begin = self._scratch_first + place // self._unit
            opened[of_range] = begin + np.arange(count, dtype=np.int32) * step
            place = end
        return opened, changed, place

    def close(self) -> None:
        """Zero what was open."""
        self._scratch[: self._used] = 0
        self._used = 0

    def _open(self, at: int, numbers: Int32Array, into: Sequence[memoryview]) -> list[int]:
        if not len(numbers):
            return []
        return self._cipher.open(self._tiles[at], self._tags[at], self._counts[at], numbers, into)

    def _seal(self, at: int, numbers: Int32Array, plain: Iterable[Tiles]) -> None:
        rows = [tile.data for tile in plain]
        counts = self._cipher.seal(rows, self._tiles[at], self._tags[at], numbers)
        self._counts[at][numbers] = counts
