"""Turning heads on the CPU: cheap checks, then addresses and sizes to the native side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops import _native
from kvkeep.ops.checks import check_dim, dense_rows
from kvkeep.ops.turns import Butterflies, HeadTurns, Orders, PreparedTurns, check_turned

_DTYPE = {torch.float32: _native.Dtype.F32, torch.bfloat16: _native.Dtype.BF16}


@dataclass(frozen=True, slots=True)
class CpuTurns:
    """Turns as the native kernels read them; the tensors are kept for their memory."""

    kind: _native.TurnKind
    shape: tuple[int, int]
    order: torch.Tensor
    factor: torch.Tensor
    addresses: tuple[int, int]


class CpuTurn:
    """`TurnOps` of one native backend; calls take turns."""

    def __init__(self, backend: _native.Backend) -> None:
        self._backend = backend

    def prepare(self, turns: HeadTurns) -> CpuTurns:
        """Return turns as dense arrays; raises where an order names no channel."""
        heads, dim = turns.shape
        check_dim(dim)
        none = torch.empty(0)
        if isinstance(turns, Orders):
            kind, order, factor = _native.TurnKind.ORDER, turns.order, none
        elif isinstance(turns, Butterflies):
            kind, order, factor = _native.TurnKind.BUTTERFLY, turns.order, turns.factor
            if dim & (dim - 1) or factor.shape != (heads, 3, dim) or order.shape != factor.shape:
                raise KernelInputError("butterflies must be [Hkv, 3, D], D a power of two")
        else:
            kind, order, factor = _native.TurnKind.MATRIX, none, turns.values
            if factor.shape != (heads, dim, dim):
                raise KernelInputError("matrices must be [Hkv, D, D]")
        if order.numel() and (int(order.min()) < 0 or int(order.max()) >= dim):
            raise KernelInputError("an order names a channel that a head does not have")
        order, factor = order.to(torch.int32).contiguous(), factor.float().contiguous()
        return CpuTurns(kind, (heads, dim), order, factor, (order.data_ptr(), factor.data_ptr()))

    def turn_heads(self, x: torch.Tensor, turns: PreparedTurns) -> torch.Tensor:
        """Return x [T, H, D] turned, in float32 and rounded once."""
        if not isinstance(turns, CpuTurns):
            raise KernelInputError(f"{type(turns).__name__} was prepared by another backend")
        check_turned(x, turns)
        dtype = _DTYPE.get(x.dtype)
        if dtype is None:
            raise KernelInputError(f"x is {x.dtype}; heads are turned in float32 and bfloat16")
        x = dense_rows(x)
        rows, heads, dim = x.shape
        row_stride, head_stride, _ = x.stride()
        order, factor = turns.addresses
        out = torch.empty((rows, heads, dim), dtype=x.dtype)
        _native.turn_heads(
            self._backend,
            dtype,
            turns.kind,
            order,
            factor,
            x.data_ptr(),
            rows,
            row_stride,
            head_stride,
            heads,
            turns.shape[0],
            dim,
            out.data_ptr(),
        )
        return out
