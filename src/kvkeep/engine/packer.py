"""Memory back from what was evicted: live tokens move to tiles of their view's own."""

from __future__ import annotations

import numpy as np
import torch

from kvkeep.cache.packing import Packing
from kvkeep.engine.evicted import dropped_tokens
from kvkeep.eviction.packing import Survivors, repack, survivors
from kvkeep.quant.codec import KVShape, pack_float_tiles, unpack_float_tiles
from kvkeep.types import PAGE_TOKENS, Int32Array, PageSpec, View
from kvkeep.watch import Packed


class Packer:
    """Packs views of pages in the model's dtype; coded pages keep their masks."""

    def __init__(self, shape: KVShape, spec: PageSpec) -> None:
        self._shape = shape
        self._coded = spec.window_tokens is not None
        self.packed_views = 0
        """Times that a view was packed, the first time and later ones."""
        self.freed_bytes = 0
        """By which views became smaller."""
        self.masked_views = 0
        """Views of coded pages whose prompts lost tokens: these stay where they are."""

    def pack(self, view: View, packing: Packing) -> None:
        """Pack what was evicted since last time, if that frees anything.

        The view attends to the same tokens afterwards, in another order of sums. Raises
        `QuotaExceeded` or `PoolExhausted` where there is no room; tokens stay masked then.
        """
        state = view.evict
        if state is None or not state.pending:
            return
        found = None if self._coded else survivors(view)
        if found is not None:
            packing.own_tail(view, found.end)
            sources = self._sources(view, packing, found)
            held = int((sources >= 0).sum())
            tiles = packing.resize(view, found.need)
            self._move(packing, found, sources, tiles)
            repack(state, found, len(tiles))
            packing.let_go(view, found.end)
            view.pack(Packed(tiles, found.end))
            self.packed_views += 1
            self.freed_bytes += (held - int(found.need.sum())) * packing.pool.spec.tile_bytes
        elif self._coded and view.length == state.watch.prompt_tokens and dropped_tokens(state):
            self.masked_views += 1
        state.pending = False

    def _sources(self, view: View, packing: Packing, found: Survivors) -> Int32Array:
        """Return the tile ids [n, L, Hkv] that `found.order` counts tokens of."""
        first = 1 if view.packed is None else view.packed.end
        pages = packing.pool.tile_table[view.slots[first : found.end]]
        return pages if view.packed is None else np.concatenate([view.packed.tiles, pages])

    def _move(
        self, packing: Packing, found: Survivors, sources: Int32Array, tiles: Int32Array
    ) -> None:
        """Copy the live tokens of each head to the front of its tiles."""
        pool, dim = packing.pool, self._shape.head_dim
        for layer, head in np.ndindex(found.counts.shape):
            count = int(found.counts[layer, head])
            if not count:
                continue
            tokens = found.order[layer, head, :count]
            places, rows = np.unique(tokens // PAGE_TOKENS, return_inverse=True)
            raw = pool.read_ids(np.ascontiguousarray(sources[places, layer, head]))
            at = torch.from_numpy(rows * PAGE_TOKENS + tokens % PAGE_TOKENS)
            need = -(-count // PAGE_TOKENS)
            k, v = unpack_float_tiles(raw, self._shape)
            dense = torch.zeros((2, need * PAGE_TOKENS, dim), dtype=k.dtype)
            dense[0, :count], dense[1, :count] = k.reshape(-1, dim)[at], v.reshape(-1, dim)[at]
            keys, values = dense.view(2, need, PAGE_TOKENS, dim)
            ids = np.ascontiguousarray(tiles[:need, layer, head])
            pool.write_ids(ids, pack_float_tiles(keys, values, self._shape.layout))
