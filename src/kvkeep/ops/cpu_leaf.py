"""Row-wise kernels on the CPU: cheap checks, then addresses and sizes to the native side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops import _native
from kvkeep.ops.layout import Heads, PackedWeight

_DTYPE = {torch.float32: _native.Dtype.F32, torch.bfloat16: _native.Dtype.BF16}


@dataclass(frozen=True, slots=True)
class CpuWeight:
    """A weight packed for one native backend; `nbytes` counts what is read to apply it once."""

    native: _native.PackedWeight
    shape: tuple[int, int]
    nbytes: int
    dtype: torch.dtype


class CpuLeaf:
    """`LeafOps` of one native backend; calls take turns."""

    def __init__(self, backend: _native.Backend) -> None:
        self._backend = backend

    @property
    def calls(self) -> int:
        """Return the number of native leaf calls so far, packing included."""
        return self._backend.calls

    def pack(self, weight: torch.Tensor, *, int8: bool = False) -> CpuWeight:
        """Pack weight [N, K]; int8 keeps one scale per output channel."""
        dtype = _DTYPE.get(weight.dtype)
        if weight.dim() != 2 or dtype is None or not weight.numel():
            raise KernelInputError(
                f"weight {tuple(weight.shape)} {weight.dtype} must be [N, K] in float32 or bfloat16"
            )
        rows = weight if weight.stride(1) == 1 else weight.contiguous()
        n, k = rows.shape
        native = _native.pack(self._backend, dtype, int8, rows.data_ptr(), n, k, rows.stride(0))
        return CpuWeight(native, (n, k), native.nbytes, weight.dtype)

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x [T, K] W^T + bias as [T, N] in x's dtype, summed over K in one order."""
        weight = _own(weight)
        x, rows, stride = _rows(x, weight)
        width = weight.shape[0]
        address = 0
        if bias is not None:
            if bias.shape != (width,) or bias.dtype is not weight.dtype or bias.stride(0) != 1:
                raise KernelInputError(
                    f"bias {tuple(bias.shape)} {bias.dtype} must be [{width}] {weight.dtype}"
                )
            address = bias.data_ptr()
        out = torch.empty((rows, width), dtype=weight.dtype)
        _native.linear(
            self._backend, weight.native, x.data_ptr(), rows, stride, address, out.data_ptr(), width
        )
        return out

    def gated_mlp(self, x: torch.Tensor, gate_up: PackedWeight, down: PackedWeight) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x)); `gate_up` is [2 F, K], gate rows first."""
        gate_up, down = _own(gate_up), _own(down)
        x, rows, stride = _rows(x, gate_up)
        width = down.shape[0]
        if gate_up.shape[0] != 2 * down.shape[1] or gate_up.dtype is not down.dtype:
            raise KernelInputError(
                f"gate_up {gate_up.shape} {gate_up.dtype} and down {down.shape} {down.dtype} "
                "must be [2 F, K] and [N, F] in one dtype"
            )
        out = torch.empty((rows, width), dtype=down.dtype)
        _native.gated_mlp(
            self._backend,
            gate_up.native,
            down.native,
            x.data_ptr(),
            rows,
            stride,
            out.data_ptr(),
            width,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight over the last dimension, in x's dtype."""
        shape = x.shape
        width = shape[-1]
        dtype = _DTYPE.get(x.dtype)
        if dtype is None or weight.dtype is not x.dtype or weight.shape != (width,):
            raise KernelInputError(
                f"weight {tuple(weight.shape)} {weight.dtype} must be [{width}] in the dtype of x, "
                f"float32 or bfloat16; x is {x.dtype}"
            )
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty(shape, dtype=x.dtype)
        _native.rms_norm(
            self._backend,
            dtype,
            x.data_ptr(),
            x.numel() // width,
            weight.data_ptr(),
            out.data_ptr(),
            width,
            eps,
        )
        return out

    def rotate_heads(
        self, qkv: torch.Tensor, heads: Heads, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Normalise and rotate qkv's query and key heads in place; cos and sin are [T, D]."""
        dtype, dim = _DTYPE.get(qkv.dtype), heads.head_dim
        rows, width = qkv.shape
        if dtype is None or width != (heads.num_q_heads + 2 * heads.num_kv_heads) * dim or dim % 2:
            raise KernelInputError(
                f"qkv {tuple(qkv.shape)} {qkv.dtype} does not hold {heads.num_q_heads} query and "
                f"{heads.num_kv_heads} KV heads of {dim} in float32 or bfloat16"
            )
        if qkv.stride(1) != 1:
            raise KernelInputError("qkv's last dimension must be dense: it is changed in place")
        for table in (cos, sin):
            if table.shape != (rows, dim) or table.dtype != qkv.dtype or not table.is_contiguous():
                raise KernelInputError(
                    f"cos and sin must be dense [{rows}, {dim}] {qkv.dtype}, "
                    f"not {tuple(table.shape)} {table.dtype}"
                )
        _native.rotate_heads(
            self._backend,
            dtype,
            qkv.data_ptr(),
            rows,
            qkv.stride(0),
            heads.num_q_heads,
            heads.num_kv_heads,
            dim,
            cos.data_ptr(),
            sin.data_ptr(),
            _norm_address(heads.q_norm, qkv, dim),
            _norm_address(heads.k_norm, qkv, dim),
            heads.eps,
        )


def _norm_address(weight: torch.Tensor | None, x: torch.Tensor, dim: int) -> int:
    if weight is None:
        return 0
    if weight.shape != (dim,) or weight.dtype != x.dtype or weight.stride(0) != 1:
        raise KernelInputError(f"a head's norm must be [{dim}] {x.dtype}")
    return weight.data_ptr()


def _own(weight: PackedWeight) -> CpuWeight:
    if not isinstance(weight, CpuWeight):
        raise KernelInputError(f"{type(weight).__name__} was packed by another backend")
    return weight


def _rows(x: torch.Tensor, weight: CpuWeight) -> tuple[torch.Tensor, int, int]:
    """Return x with dense rows, its number of rows and their stride in elements."""
    shape = x.shape
    if len(shape) != 2 or shape[1] != weight.shape[1] or x.dtype is not weight.dtype:
        raise KernelInputError(
            f"x {tuple(shape)} {x.dtype} must be [T, {weight.shape[1]}] {weight.dtype}"
        )
    stride, step = x.stride()
    if step != 1:
        x = x.contiguous()
        stride = shape[1]
    return x, shape[0], stride
