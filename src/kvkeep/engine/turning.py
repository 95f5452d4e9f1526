"""Queries and keys turned as a codec wants them, so that scores stay as they are."""

from __future__ import annotations

import torch

from kvkeep.ops.layout import Ops, PackedWeight
from kvkeep.quant.codec import Rotation


class Turning:
    """A codec's rotation on the kernels' own matrix product: a row's bits depend on it alone."""

    def __init__(self, ops: Ops, rotation: Rotation | None, dtype: torch.dtype) -> None:
        self._leaf = ops.leaf
        self._packed: tuple[PackedWeight, PackedWeight] | None = None
        if rotation is not None:
            q, k = (ops.leaf.pack(m.T.contiguous().to(ops.device, dtype)) for m in rotation)
            self._packed = (q, k)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Return queries [T, Hq, D] turned."""
        return q if self._packed is None else self._turned(q, self._packed[0])

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        """Return keys [T, Hkv, D] turned."""
        return k if self._packed is None else self._turned(k, self._packed[1])

    def _turned(self, x: torch.Tensor, by: PackedWeight) -> torch.Tensor:
        return self._leaf.linear(x.reshape(-1, x.shape[-1]), by, None).view(x.shape)
