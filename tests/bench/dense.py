"""A model's KV cache for one sequence, in a few plain lines: what faster ones are held against."""

from __future__ import annotations

import torch
from torch import Tensor


class Dense:
    """Keeps K and V; a row sees what is not after it and, of each layer and head, what lives."""

    def __init__(self, live: Tensor | None = None) -> None:
        """`live`: [L, Hkv, T] of the first T tokens; it may be set later."""
        self.live = live
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        known = self._kv.get(layer, (k[:0], v[:0]))
        self._kv[layer] = torch.cat([known[0], k]).clone(), torch.cat([known[1], v]).clone()

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = self._kv[layer]
        group, tokens, rows = q.shape[1] // k.shape[1], len(k), len(q)
        out = torch.zeros_like(q)
        for row in range(rows):
            for head in range(q.shape[1]):
                seen = torch.arange(tokens) <= tokens - rows + row
                if self.live is not None:
                    known = self.live.shape[-1]
                    seen[:known] &= self.live[layer, head // group]
                scores = k[seen, head // group] @ q[row, head] / q.shape[2] ** 0.5
                out[row, head] = scores.softmax(0) @ v[seen, head // group]
        return out
