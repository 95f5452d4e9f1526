"""Row-wise kernels on a device: torch's own, which calls the vendor's matrix products.

These do not promise that a row's bits are the same for any number of rows; a CPU's kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kvkeep.errors import ConfigError, KernelInputError
from kvkeep.ops.layout import Heads, PackedWeight


@dataclass(frozen=True, slots=True)
class TorchWeight:
    """A weight [N, K] as it is, on the device."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K)."""
        n, k = self.values.shape
        return n, k

    @property
    def nbytes(self) -> int:
        """Return the bytes read to apply it once."""
        return self.values.nbytes


class TorchLeaf:
    """`LeafOps` in plain torch on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pack(self, weight: torch.Tensor, *, int8: bool = False) -> TorchWeight:
        """Move weight [N, K] to the device; int8 is refused."""
        if int8:
            raise ConfigError("weights: 'int8' runs on a CPU alone; use 'float' on this device")
        if weight.dim() != 2:
            raise KernelInputError(f"weight {tuple(weight.shape)} must be [N, K]")
        return TorchWeight(weight.to(self._device, copy=True).contiguous())

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x [T, K] W^T + bias as [T, N] in x's dtype."""
        return F.linear(x, _own(weight, x), bias)

    def gated_mlp(self, x: torch.Tensor, gate_up: PackedWeight, down: PackedWeight) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x)); `gate_up` is [2 F, K], gate rows first."""
        gate, up = F.linear(x, _own(gate_up, x)).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        return F.linear(hidden, _own(down, hidden))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight over the last dimension, in x's dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)

    def rotate_heads(
        self, qkv: torch.Tensor, heads: Heads, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Normalise and rotate qkv's query and key heads in place; cos and sin are [T, D]."""
        q, k, _ = heads.split(qkv)
        for x, weight in ((q, heads.q_norm), (k, heads.k_norm)):
            y = x.clone() if weight is None else self.rms_norm(x, weight, heads.eps)
            low, high = y.chunk(2, dim=-1)
            turned = torch.cat((-high, low), dim=-1)
            x.copy_(y * cos[:, None] + turned * sin[:, None])


def _own(weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, TorchWeight):
        raise KernelInputError(f"{type(weight).__name__} was packed by another backend")
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.values.dtype:
        raise KernelInputError(
            f"x {tuple(x.shape)} {x.dtype} must be [T, {weight.shape[1]}] {weight.values.dtype}"
        )
    return weight.values
