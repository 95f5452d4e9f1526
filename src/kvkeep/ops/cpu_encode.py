"""Coding pages on the CPU: cheap checks, then addresses and sizes to the native side."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.errors import KernelInputError, NonFiniteKV
from kvkeep.ops import _native
from kvkeep.ops.checks import check_dim
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.layout import LANE_LAYOUTS, TORCH_DTYPE, float_tile_bytes
from kvkeep.types import PAGE_TOKENS, Layout

_DTYPE: Final = {torch.float32: _native.Dtype.F32, torch.bfloat16: _native.Dtype.BF16}
_REFUSED: Final[tuple[tuple[int, Literal["K", "V"]], ...]] = (
    (1, "K"),
    (2, "V"),
    (4, "K"),
    (8, "V"),
)
"""What a bit says of a tile; the sinks' come last."""


class CpuEncoder:
    """Codes pages by one path's kernels, on the caller's thread."""

    def __init__(self, isa: _native.Isa) -> None:
        self._isa = isa

    def encode(
        self, k: torch.Tensor, v: torch.Tensor, layout: Layout, *, first: bool, narrowed: float
    ) -> NDArray[np.uint8]:
        """Return coded tiles [N, tile bytes] of k, v [N, S, D], with their sinks where `first`.

        `narrowed` is the part of a channel's range that keys are fitted from; 0: its ends are
        codes. Raises `NonFiniteKV`.
        """
        if k.shape != v.shape or k.dim() != 3 or k.shape[1] != PAGE_TOKENS or k.dtype != v.dtype:
            raise KernelInputError(
                f"k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype} must be "
                f"[N, {PAGE_TOKENS}, D] in one dtype"
            )
        count, _, dim = k.shape
        check_dim(dim)
        if k.dtype not in _DTYPE:
            k, v = k.float(), v.float()
        k, v = k.contiguous(), v.contiguous()
        tiles = np.empty((count, tile_bytes(layout, dim, first=first)), np.uint8)
        refused = np.zeros(count, np.uint8)
        _native.encode(
            self._isa,
            _DTYPE[k.dtype],
            k.data_ptr(),
            v.data_ptr(),
            count,
            dim,
            layout,
            first,
            narrowed,
            tiles.ctypes.data,
            tiles.shape[1],
            refused.ctypes.data,
        )
        if refused.any():
            _refuse(refused)
        return tiles


def rows_of_tiles(
    tiles: torch.Tensor, layout: Layout, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k, v [N, S, D] of tiles [N, tile bytes] uint8 as a CPU's kernels read them."""
    dtype = TORCH_DTYPE[layout]
    check_dim(dim)
    if layout not in LANE_LAYOUTS.values() or tiles.shape[1:] != (float_tile_bytes(layout, dim),):
        raise KernelInputError(
            f"tiles {tuple(tiles.shape)} are not {layout.name} of {dim} channels"
        )
    tiles = tiles.contiguous()
    k, v = (torch.empty((len(tiles), PAGE_TOKENS, dim), dtype=dtype) for _ in range(2))
    _native.rows_of_tiles(
        tiles.data_ptr(), len(tiles), dim, dtype.itemsize, k.data_ptr(), v.data_ptr()
    )
    return k, v


def _refuse(refused: NDArray[np.uint8]) -> None:
    """Raise for the first head of the first part that has one."""
    for bit, what in _REFUSED:
        heads = np.flatnonzero(refused & bit)
        if heads.size:
            raise NonFiniteKV(what, int(heads[0]))
