"""How a pool's memory is divided: pages of each kind, with slots and tiles of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvkeep.cache.free import FreeList
from kvkeep.cache.storage import TileRange
from kvkeep.errors import ConfigError
from kvkeep.types import Int32Array, PageKind, PageSpec


@dataclass(frozen=True, slots=True)
class Beside:
    """What a pool of coded pages keeps beside them."""

    num_first: int
    """Of the pages, those that may be a sequence's first; 0: all."""
    num_staged: int
    """Pages in the model's dtype, of `staged_tile_bytes` a tile."""
    staged_tile_bytes: int
    num_kept: int = 0
    """Pages of the same size for views that are not coded."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tiles of one size: those of some layers and heads of every page of a class."""

    place: int
    where: NDArray[np.bool_]
    """[L, Hkv]"""
    per_page: int
    range: TileRange
    tiles: FreeList


@dataclass(frozen=True, slots=True)
class PageClass:
    """Pages of one kind: their slots and tiles, free or not."""

    num_pages: int
    first_slot: int
    slots: FreeList
    parts: tuple[Part, ...]

    @property
    def free_pages(self) -> int:
        """Return the pages that can still be handed out."""
        return min(len(self.slots), *(len(p.tiles) // p.per_page for p in self.parts))

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tiles."""
        return sum(p.range.num_tiles * p.range.tile_bytes for p in self.parts)

    def in_layer(self, layer: int) -> Iterator[tuple[Part, NDArray[np.bool_]]]:
        """Yield the parts that a layer's tiles are of, and which heads [Hkv] are of each."""
        for part in self.parts:
            if part.where[layer].any():
                yield part, part.where[layer]


class Wanted(NamedTuple):
    """Pages of one kind."""

    kind: PageKind
    pages: int
    sizes: Int32Array
    """[L, Hkv] bytes of each tile."""

    def parts(self) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield each size and where [L, Hkv] tiles have it, the largest first."""
        for size in np.unique(self.sizes)[::-1]:
            yield int(size), self.sizes == size


def wanted_of(spec: PageSpec, num_pages: int, beside: Beside | None) -> list[Wanted]:
    """Return the kinds of pages there are; raises `ConfigError` for tiles of a wrong size."""
    sizes = spec.tile_sizes()
    wanted = [Wanted(PageKind.PLAIN, num_pages, sizes)]
    if beside is not None:
        plain = np.full_like(sizes, beside.staged_tile_bytes)
        wanted += [
            Wanted(PageKind.FIRST, beside.num_first, sizes + spec.first_extra_bytes),
            Wanted(PageKind.STAGED, beside.num_staged, plain),
            Wanted(PageKind.KEPT, beside.num_kept, plain),
        ]
    wanted = [one for one in wanted if one.pages]
    for size, _ in (part for one in wanted for part in one.parts()):
        if size <= 0 or size % 64:
            raise ConfigError(f"tile_bytes is {size}; it must be a positive multiple of 64")
    return wanted


def ranges_of(wanted: Sequence[Wanted]) -> list[TileRange]:
    """Return where the tiles of each part are; a unit is the largest that all sizes are made of."""
    parts = [(one.pages, *part) for one in wanted for part in one.parts()]
    unit = math.gcd(*(size for _, size, _ in parts))
    ranges: list[TileRange] = []
    for pages, size, where in parts:
        first_byte = ranges[-1].end_byte if ranges else 0
        ranges.append(TileRange(size, pages * int(where.sum()), first_byte, unit))
    return ranges


def classes_of(wanted: Sequence[Wanted], ranges: Sequence[TileRange]) -> tuple[PageClass, ...]:
    """Return the classes of pages, all free, over ranges of their tiles."""
    made: list[PageClass] = []
    slot = place = 0
    for one in wanted:
        parts: list[Part] = []
        for _, where in one.parts():
            tiles = ranges[place]
            free = FreeList(tiles.num_tiles, "tile")
            parts.append(Part(place, where, int(where.sum()), tiles, free))
            place += 1
        made.append(PageClass(one.pages, slot, FreeList(one.pages, "page"), tuple(parts)))
        slot += one.pages
    return tuple(made)
