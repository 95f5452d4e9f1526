"""The shield seam: how K, V and Q look in memory; `kvkeep.sealing` is the seam below memory."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from kvkeep.ops.layout import Heads, Ops, WeightFold

Role = Literal["q", "k", "v"]


class Transform(Protocol):
    """A shield's work within a step, by the kernels of one backend."""

    def transform(self, x: torch.Tensor, role: Role, layer: int) -> torch.Tensor:
        """Return x [T, H, D] as stored (k, v) or as used against stored keys (q)."""

    def restore(self, out: torch.Tensor, layer: int) -> torch.Tensor:
        """Return attention outputs [T, Hq, D] as the model's next layer takes them."""


class Shield(Protocol):
    """Transforms K, V and Q so that attention is unchanged."""

    name: str

    def folds(self, heads: Heads) -> tuple[WeightFold, ...]:
        """Return weight changes this shield wants at load, applied in order."""

    def on(self, heads: Heads, ops: Ops) -> Transform:
        """Return the work within a step of a model whose weights went through the folds."""


class NoShield:
    """Nothing is transformed: the baseline."""

    name = "none"

    def folds(self, heads: Heads) -> tuple[WeightFold, ...]:
        """No weight changes."""
        return ()

    def on(self, heads: Heads, ops: Ops) -> Transform:
        """Nothing to prepare."""
        return self

    def transform(self, x: torch.Tensor, role: Role, layer: int) -> torch.Tensor:
        """Return x as it is."""
        return x

    def restore(self, out: torch.Tensor, layer: int) -> torch.Tensor:
        """Return the output as it is."""
        return out
