"""Pages that are coded when their prompt is done: the released code's prefill, as an ablation.

A prompt then sees all of itself in 16 bits, so what its pages hold depends on what was found of it
in a cache and what was computed beside them. No engine could index them; this one does so for the
suite alone, whose prompts are computed once and whole.
"""

from __future__ import annotations

import hashlib

import torch

from kvkeep.cache.pool import TilePool
from kvkeep.ops.layout import LANE_LAYOUTS
from kvkeep.quant.baselines.base import Baseline, Dequantised
from kvkeep.quant.codec import KVShape, Place, Tiles, pack_float_tiles, unpack_float_tiles


class Late(Dequantised):
    """Pages stay as they were computed until `settle` stores what comes back of them."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__(baseline)
        self.name = f"{baseline.name}-late"
        self._waiting: dict[tuple[int, bytes], Place] = {}

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Return float tiles of k, v."""
        tiles = pack_float_tiles(k, v, LANE_LAYOUTS[k.dtype])
        self._waiting[place.layer, _digest(tiles)] = place
        return tiles

    def settle(self, pool: TilePool, shape: KVShape) -> None:
        """Code what waits, wherever it lies; nothing may run meanwhile."""
        for slot in range(len(pool.tile_table)):
            for layer in range(shape.num_layers if pool.tile_table[slot].min() >= 0 else 0):
                tiles = pool.read_tiles(slot, layer)
                place = self._waiting.pop((layer, _digest(tiles)), None)
                if place is not None:
                    k, v = unpack_float_tiles(tiles, shape)
                    pool.write_tiles(slot, layer, super().encode(k, v, place))
        self._waiting.clear()


def _digest(tiles: Tiles) -> bytes:
    return hashlib.blake2b(tiles.tobytes(), digest_size=16).digest()
