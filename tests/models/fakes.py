"""Plain float kernels and a dense KV cache: what the models package needs of the layers below."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from kvkeep.ops.layout import Attended, AttentionPlan, LayerKV, Observe, PackedWeight
from kvkeep.types import Int32Array


@dataclass(frozen=True)
class PlainWeight:
    """A weight as it came, rounded where int8 was asked for."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K)."""
        rows, width = self.matrix.shape
        return rows, width

    @property
    def nbytes(self) -> int:
        """Return the matrix's bytes."""
        return self.matrix.nbytes


class PlainLeaf:
    """LeafOps in torch, row by row: bits do not depend on the number of rows."""

    def pack(self, weight: Tensor, *, int8: bool = False) -> PlainWeight:
        """Keep a copy; int8 rounds per output channel."""
        if not int8:
            return PlainWeight(weight.clone())
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return PlainWeight(((weight.float() / scale).round() * scale).to(weight.dtype))

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return [T, N]."""
        assert x.ndim == 2
        assert x.is_contiguous()
        assert isinstance(weight, PlainWeight)
        return torch.stack([functional.linear(row, weight.matrix, bias) for row in x])

    def gated_mlp(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
        """Return [T, K]."""
        gate, up = self.linear(x, gate_up, None).chunk(2, -1)
        return self.linear(functional.silu(gate) * up, down, None)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x's shape."""
        wide = x.float()
        scale = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return (weight * (wide * scale)).to(x.dtype)


@dataclass
class DenseKV:
    """K and V of several requests as plain tensors; `counts` are a step's rows per request."""

    counts: list[int]
    keys: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    values: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store each request's rows after those it has."""
        parts = zip(k.split_with_sizes(self.counts), v.split_with_sizes(self.counts), strict=True)
        for request, (key, value) in enumerate(parts):
            for store, new in ((self.keys, key), (self.values, value)):
                old = store.get((layer, request), new[:0])
                store[layer, request] = torch.cat([old, new])

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend causally within each request."""
        outs = [
            self._one(part, self.keys[layer, request], self.values[layer, request])
            for request, part in enumerate(q.split_with_sizes(self.counts))
        ]
        return torch.cat(outs)

    @staticmethod
    def _one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, total = len(q), len(k)
        mask = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, enable_gqa=True
        )
        return out.transpose(0, 1)


class NoAttention:
    """AttentionOps that must not be reached: these tests bring their own cache."""

    def append(self, kv: LayerKV, k: Tensor, v: Tensor, slots: Int32Array) -> None:
        """Fail."""
        raise AssertionError

    def attend(
        self, q: Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Fail."""
        raise AssertionError

    def merge(self, outs: Tensor, lse2s: Tensor) -> tuple[Tensor, Tensor]:
        """Fail."""
        raise AssertionError
