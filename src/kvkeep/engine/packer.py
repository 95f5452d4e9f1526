"""Memory back from what was evicted: live tokens move to tiles of their view's own."""

from __future__ import annotations

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

PARTS: Final = 40
"""A prompt's pages are moved and let go of in so many parts: more memory than one is never held."""


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
            cuts = found.cuts(PARTS)
            moving = packing.begin(view, found.end, found.stays, cuts)
            for begin, wanted in cuts:
                packing.take(moving, wanted)
                for layer in range(spec.num_layers):
                    self._move(packing.pool, found, sources, moving.table, wanted, layer)
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
        layer: int,
    ) -> None:
        """Write a layer's wanted tiles that are not what they were; all is read before."""
        stays, ids, old = (x[:, layer] for x in (found.stays, tiles, sources))
        same = ids == np.take_along_axis(old, np.maximum(stays, 0), 0)
        fresh: list[tuple[Int32Array, Tiles]] = []
        for alike in pool.spec.alike():
            there = wanted[:, layer] & alike[layer]
            at, head = np.nonzero(there & (stays >= 0) & ~same)
            if len(at):
                fresh.append((ids[at, head], pool.read_ids(old[stays[at, head], head]).copy()))
            at, head = np.nonzero(there & (stays == WRITTEN))
            if len(at):
                tokens = _filled(found.source[layer, head, at])
                places = head[:, None] * len(old) + tokens // PAGE_TOKENS
                read, rows = np.unique(places, return_inverse=True)
                rows = rows.reshape(tokens.shape) * PAGE_TOKENS + tokens % PAGE_TOKENS
                raw = pool.read_ids(old[read % len(old), read // len(old)])
                layout = pool.spec.layout_at(layer, int(head[0]))
                fresh.append((ids[at, head], regroup(raw, rows, layout, self._shape)))
        for where, content in fresh:
            pool.write_ids(where, content)


def _filled(source: Int64Array) -> Int64Array:
    """Return tokens [n, S] with those of each tile again where it has none: its range is theirs."""
    count = (source >= 0).sum(1, keepdims=True)
    return np.take_along_axis(source, np.arange(PAGE_TOKENS) % count, 1)
