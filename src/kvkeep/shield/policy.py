"""The shield seam: how K, V and Q look in memory, and a page's bytes below it."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from kvkeep.ops.layout import WeightFold
from kvkeep.types import SealContext

Role = Literal["q", "k", "v"]


class Shield(Protocol):
    """Transforms K, V and Q so that attention is unchanged, and seals bytes that leave memory."""

    name: str

    def folds(self) -> tuple[WeightFold, ...]:
        """Return weight changes this shield wants at load, applied in order."""

    def transform(self, x: torch.Tensor, role: Role) -> torch.Tensor:
        """Return x [T, H, D] as stored (k, v) or as used against stored keys (q)."""

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """Return attention outputs [T, Hq, D] in plain coordinates."""

    def seal(self, blob: bytes, context: SealContext) -> bytes:
        """Return `blob` sealed for `context`."""

    def open(self, blob: bytes, context: SealContext) -> bytes:
        """Return the plain bytes; raises `SealError` where the context differs."""


class NoShield:
    """Nothing is transformed or sealed: the baseline."""

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

    def seal(self, blob: bytes, context: SealContext) -> bytes:
        """Return the plain bytes."""
        return blob

    def open(self, blob: bytes, context: SealContext) -> bytes:
        """Return the bytes as they are."""
        return blob
