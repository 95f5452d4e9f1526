"""The shield seam: what K, V and Q look like in memory, and what a page's bytes look like below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch

from kvkeep.types import SealContext

Role = Literal["q", "k", "v"]
WeightFold = Callable[[str, torch.Tensor], torch.Tensor]
"""Changes one named weight at load, in the order the folds are listed."""


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
