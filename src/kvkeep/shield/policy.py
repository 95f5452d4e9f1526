"""The shield seam: how K, V and Q look in memory; `kvkeep.sealing` is the seam below memory."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from kvkeep.ops.layout import WeightFold

Role = Literal["q", "k", "v"]


class Shield(Protocol):
    """Transforms K, V and Q so that attention is unchanged."""

    name: str

    def folds(self) -> tuple[WeightFold, ...]:
        """Return weight changes this shield wants at load, applied in order."""

    def transform(self, x: torch.Tensor, role: Role) -> torch.Tensor:
        """Return x [T, H, D] as stored (k, v) or as used against stored keys (q)."""

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """Return attention outputs [T, Hq, D] in plain coordinates."""


class NoShield:
    """Nothing is transformed: the baseline."""

    name = "none"

    def folds(self) -> tuple[WeightFold, ...]:
        """No weight changes."""
        return ()

    def transform(self, x: torch.Tensor, role: Role) -> torch.Tensor:
        """Return x as it is."""
        return x

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """Return the output as it is."""
        return out
