"""Reference row-wise kernels: torch in float64, rounded once; what kernels are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import Heads, PackedWeight


@dataclass(frozen=True, slots=True)
class ReferenceWeight:
    """A weight as it came, or its int8 codes [N, K] with `scales` [N]."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K)."""
        n, k = self.codes.shape
        return n, k

    @property
    def nbytes(self) -> int:
        """Return the bytes read to apply it once."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


class ReferenceLeaf:
    """`LeafOps` in plain torch."""

    def __init__(self) -> None:
        self.calls = 0
        """Number of kernel calls so far, packing excluded."""

    def pack(self, weight: torch.Tensor, *, int8: bool = False) -> ReferenceWeight:
        """Pack weight [N, K]; int8 keeps one scale per output channel."""
        if weight.dim() != 2:
            raise KernelInputError(f"weight {tuple(weight.shape)} must be [N, K]")
        if not int8:
            return ReferenceWeight(weight.clone(), None, weight.dtype)
        top = weight.float().abs().amax(dim=1)
        scales = torch.where(top > 0, top / 127, torch.ones_like(top))
        codes = torch.round(weight.float() / scales[:, None]).to(torch.int8)
        return ReferenceWeight(codes, scales, weight.dtype)

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x [T, K] W^T + bias as [T, N] in x's dtype."""
        self.calls += 1
        return self._linear(x, _own(weight), bias)

    def gated_mlp(self, x: torch.Tensor, gate_up: PackedWeight, down: PackedWeight) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x)); `gate_up` is [2 F, K], gate rows first."""
        self.calls += 1
        gate, up = self._linear(x, _own(gate_up), None).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        return self._linear(hidden, _own(down), None)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight over the last dimension, in x's dtype."""
        self.calls += 1
        wide = x.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)

    def rotate_heads(
        self, qkv: torch.Tensor, heads: Heads, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Normalise and rotate qkv's query and key heads in place; cos and sin are [T, D]."""
        self.calls += 1
        q, k, _ = heads.split(qkv)
        for x, weight in ((q, heads.q_norm), (k, heads.k_norm)):
            y = x.clone() if weight is None else self.rms_norm(x, weight, heads.eps)
            low, high = y.chunk(2, dim=-1)
            turned = torch.cat((-high, low), dim=-1)
            x.copy_(y * cos[:, None] + turned * sin[:, None])

    @staticmethod
    def _linear(
        x: torch.Tensor, weight: ReferenceWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
            raise KernelInputError(
                f"x {tuple(x.shape)} {x.dtype} must be [T, {weight.shape[1]}] {weight.dtype}"
            )
        out = x.double() @ weight.codes.double().T
        if weight.scales is not None:
            out *= weight.scales
        if bias is not None:
            out += bias
        return out.to(x.dtype)


def _own(weight: PackedWeight) -> ReferenceWeight:
    if not isinstance(weight, ReferenceWeight):
        raise KernelInputError(f"{type(weight).__name__} was packed by another backend")
    return weight
