"""A dense KV cache: what a hosted model needs of the layers beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional


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
