"""Tiles of tokens that stood in other tiles, in the same form: what packing writes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.ops.codes import CODE_BITS, pack_codes, unpack_codes
from kvkeep.quant.codec import KVShape, Tiles, pack_float_tiles, unpack_float_tiles
from kvkeep.quant.hack import together
from kvkeep.types import PAGE_TOKENS, Layout


def regroup(tiles: Tiles, rows: NDArray[np.int64], layout: Layout, shape: KVShape) -> Tiles:
    """Return tiles [n, tile bytes] of the tokens `rows` [n, S], counted over `tiles`.

    What is in the model's dtype, and values' codes, move bit by bit. Keys' codes share a scale with
    the tokens they stood beside, so they are taken anew, of what they stand for.
    """
    at = torch.from_numpy(rows)
    if layout not in CODE_BITS:
        k, v = (x.reshape(-1, shape.head_dim)[at] for x in unpack_float_tiles(tiles, shape))
        return pack_float_tiles(k, v, layout)
    raw = torch.from_numpy(np.ascontiguousarray(tiles))
    codes = unpack_codes(raw, layout, shape.head_dim)
    chosen = together(codes, at // PAGE_TOKENS, at % PAGE_TOKENS, CODE_BITS[layout].k)
    return np.asarray(pack_codes(chosen, layout).numpy())
