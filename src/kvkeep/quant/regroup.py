"""Tiles of tokens that stood in other tiles, in the same form: what packing writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.ops.codes import CODE_BITS, pack_codes, unpack_codes
from kvkeep.quant.codec import KVShape, Tiles
from kvkeep.quant.hack import together
from kvkeep.types import PAGE_TOKENS, Layout

_SIDE_BY_SIDE: Final[Mapping[Layout, tuple[tuple[np.dtype[Any], int], ...]]] = {
    Layout.F32: ((np.dtype(np.uint32), 16), (np.dtype(np.uint32), 1)),
    Layout.BF16: ((np.dtype(np.uint32), 16), (np.dtype(np.uint16), 2)),
    Layout.ROWS_BF16: ((np.dtype(np.uint16), 1), (np.dtype(np.uint16), 1)),
}
"""Of keys and of values in the model's dtype, what stays together, and of how many tokens such
cells lie side by side (`ops/layout.py`).
"""


def regroup(tiles: Tiles, rows: NDArray[np.int64], layout: Layout, shape: KVShape) -> Tiles:
    """Return tiles [n, tile bytes] of the tokens `rows` [n, S], counted over `tiles`.

    What is in the model's dtype, and values' codes, move bit by bit. Keys' codes share a scale with
    the tokens they stood beside, so they are taken anew, of what they stand for.
    """
    if layout not in CODE_BITS:
        return _moved(tiles, rows, layout)
    at = torch.from_numpy(rows)
    raw = torch.from_numpy(np.ascontiguousarray(tiles))
    codes = unpack_codes(raw, layout, shape.head_dim)
    chosen = together(codes, at // PAGE_TOKENS, at % PAGE_TOKENS, CODE_BITS[layout].k)
    return np.asarray(pack_codes(chosen, layout).numpy())


def _moved(tiles: Tiles, rows: NDArray[np.int64], layout: Layout) -> Tiles:
    """Return tiles of the model's dtype, of whose tokens nothing but the place changes."""
    page, row = np.divmod(rows, PAGE_TOKENS)
    found = np.empty((len(rows), tiles.shape[1]), np.uint8)
    half = tiles.shape[1] // 2
    for begin, (dtype, beside) in zip((0, half), _SIDE_BY_SIDE[layout], strict=True):
        there, here = (
            one[:, begin : begin + half]
            .view(dtype)
            .reshape(len(one), PAGE_TOKENS // beside, -1, beside)
            for one in (tiles, found)
        )
        cells = there[page, row // beside, :, row % beside]
        here[:] = cells.reshape(len(rows), PAGE_TOKENS // beside, beside, -1).swapaxes(2, 3)
    return found
