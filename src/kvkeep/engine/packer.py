"""Memory back from what was evicted: live tokens move to tiles of their view's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from kvkeep.cache.packing import Packing
from kvkeep.cache.parts import Pages
from kvkeep.cache.storage import Tiles
from kvkeep.eviction.packing import (
    WRITTEN,
    Arrangement,
    Bools,
    Int64Array,
    arrangement,
    repack,
)
from kvkeep.quant.codec import KVShape
from kvkeep.quant.regroup import regroup
from kvkeep.types import PAGE_TOKENS, Int32Array, View

PARTS: Final = 64
"""A prompt's pages are moved and let go of in so many parts: more memory than one is never held."""

TILES: Final = 512
"""So many tiles are put together at a time, or those of one layer."""


class Packer:
    """Packs views, each in the form of its pages."""

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        self.packed_views = 0
        """Times that a view was packed, the first time and later ones."""
        self.freed_bytes = 0
        """By which views became smaller."""

    def pack(self, view: View, packing: Packing) -> None:
        """Pack what was evicted since last time, if that frees anything.

        The view attends to the same tokens afterwards, in another order of sums. Raises
        `QuotaExceeded` or `PoolExhausted` where there is no room; tokens stay masked then.
        """
        state = view.evict
        if state is None or not state.pending:
            return
        spec = packing.pool.spec
        found = arrangement(view, spec.window_tokens)
        if found is not None:
            sources = self._sources(view, packing, found)
            packing.pool.prove(sources[sources >= 0])
            cuts = found.cuts(PARTS)
            moving = packing.begin(view, found.end, found.stays, cuts)
            for begin, wanted in cuts:
                packing.take(moving, wanted)
                for layers in _few(wanted):
                    self._move(packing.pool, found, sources, moving.table, wanted, layers)
                packing.let_go(moving, begin)
            repack(state, found)
            view.pack(packing.finish(moving, found.end))
            self.packed_views += 1
            gone = (sources >= 0).sum(0) - found.need.sum(0)
            self.freed_bytes += int((gone * spec.tile_sizes()).sum())
        state.pending = False

    def _sources(self, view: View, packing: Packing, found: Arrangement) -> Int32Array:
        """Return the tile ids [n, L, Hkv] that `found.source` counts tokens of."""
        first = 1 if view.packed is None else view.packed.end
        pages = packing.pool.tile_table[view.slots[first : found.end]]
        return pages if view.packed is None else np.concatenate([view.packed.tiles, pages])

    def _move(
        self,
        pool: Pages,
        found: Arrangement,
        sources: Int32Array,
        tiles: Int32Array,
        wanted: Bools,
        layers: slice,
    ) -> None:
        """Write some layers' wanted tiles that are not what they were; all is read before."""
        source = found.source[layers]
        stays, ids, old = (x[:, layers] for x in (found.stays, tiles, sources))
        same = ids == np.take_along_axis(old, np.maximum(stays, 0), 0)
        fresh: list[tuple[Int32Array, Tiles]] = []
        for alike in pool.spec.alike():
            there = wanted[:, layers] & alike[layers]
            at = np.nonzero(there & (stays >= 0) & ~same)
            if len(at[0]):
                fresh.append((ids[at], pool.read_ids(old[stays[at], *at[1:]]).copy()))
            place, layer, head = at = np.nonzero(there & (stays == WRITTEN))
            if len(place):
                tokens = _filled(source[layer, head, place])
                of_head = (layer * source.shape[1] + head) * len(old)
                places = of_head[:, None] + tokens // PAGE_TOKENS
                read, rows = np.unique(places, return_inverse=True)
                rows = rows.reshape(tokens.shape) * PAGE_TOKENS + tokens % PAGE_TOKENS
                by_head = np.ascontiguousarray(np.moveaxis(old, 0, -1))
                raw = pool.read_ids(by_head.ravel()[read])
                layout = pool.spec.layout_at(layers.start + int(layer[0]), int(head[0]))
                fresh.append((ids[at], regroup(raw, rows, layout, self._shape)))
        for where, content in fresh:
            pool.write_ids(where, content)


def _few(wanted: Bools) -> Iterator[slice]:
    """Return layers that are moved at a time, so that few tiles are beside the pool."""
    layers = wanted.shape[1]
    step = max(1, layers * TILES // max(1, int(wanted.sum())))
    return (slice(begin, begin + step) for begin in range(0, layers, step))


def _filled(source: Int64Array) -> Int64Array:
    """Return tokens [n, S] with those of each tile again where it has none: its range is theirs."""
    count = (source >= 0).sum(1, keepdims=True)
    return np.take_along_axis(source, np.arange(PAGE_TOKENS) % count, 1)
