"""Mixture of experts whose rows do not depend on which other rows chose the same expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvkeep.models.leaf import GatedMLP, Leaf, Packing


class Router(Leaf):
    """Chooses each row's experts and their weights; never packed to int8."""

    def __init__(
        self, packing: Packing, shape: tuple[int, int], top_k: int, *, normalise: bool
    ) -> None:
        super().__init__({"weight": shape})
        self._ops = packing.ops
        self._top_k = top_k
        self._normalise = normalise

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Pack the weight."""
        self._weight = self._ops.pack(tensors["weight"])
        self.read_bytes = self._weight.nbytes

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [T, k] in x's dtype and experts [T, k] for x [T, K]."""
        logits = self._ops.linear(x, self._weight, None)
        weights, experts = logits.softmax(-1, torch.float32).topk(self._top_k, -1)
        if self._normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts


class SparseMLP(nn.Module):
    """The chosen experts' weighted sum, added per row in order of expert number, in float32."""

    def __init__(self, gate: Router, experts: list[GatedMLP]) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self._rows = [expert.rows for expert in experts]

    def __call__(self, x: Tensor) -> Tensor:
        """Return [1, T, K] for x [1, T, K]."""
        rows = x.view(-1, x.shape[-1])
        weights, chosen = self.gate(rows)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self._rows)).tolist()
        total = torch.zeros_like(rows, dtype=torch.float32)
        scale = weights.flatten().float()[:, None]
        begin = 0
        for expert, count in zip(self._rows, counts, strict=True):
            if count:
                picks = order[begin : begin + count]
                users = picks // chosen.shape[1]
                total.index_add_(0, users, expert(rows[users]).float() * scale[picks])
                begin += count
        return total.to(x.dtype).unsqueeze(0)
