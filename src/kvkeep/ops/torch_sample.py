"""Sampling on a device: all rows at once, settings uploaded once, one small download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import Drawn, DrawRow, Largest
from kvkeep.ops.upload import Uploader

_BLOCK: Final = 512
_MIN_EXPONENT: Final = -120.0


class TorchSample:
    """`SampleOps` in torch on one device; rows may lie on the host, they are brought there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._upload = Uploader(device)

    def largest(self, rows: Sequence[torch.Tensor]) -> list[Largest]:
        """Return the largest of each row of logits [V], float32 or bfloat16."""
        if not rows:
            return []
        top, at = self._stack(rows).max(dim=1)  # the first of equal ones; not a number wins
        found = torch.stack((at.double(), top.double()), dim=1).tolist()
        return [Largest(int(token), logit) for token, logit in found]

    def draw(self, rows: Sequence[DrawRow]) -> list[Drawn]:
        """Draw an id per row; no row's depends on another."""
        if not rows:
            return []
        logits = self._stack([row.logits for row in rows])
        settings = [(r.top, r.scale, r.bound, float(r.ties), r.uniform) for r in rows]
        wide = self._upload([np.array(settings, np.float64)])[0]
        top, scale, bound = wide[:, :3].float().tensor_split(3, dim=1)
        weights = torch.exp2(((logits - top) * scale).clamp_min(_MIN_EXPONENT))
        ids = torch.arange(logits.shape[1], device=self._device)
        kept = (weights > bound) | ((weights == bound) & (ids < wide[:, 3:4]))
        weights = torch.where(kept, weights, 0.0)
        pad = -logits.shape[1] % _BLOCK
        blocks = torch.nn.functional.pad(weights, (0, pad)).view(len(rows), -1, _BLOCK)
        sums = blocks.sum(dim=2).double()
        mass = sums.sum(dim=1, keepdim=True)
        target = wide[:, 4:5] * mass
        block, before = _find(sums, target)
        inner = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
        index, _ = _find(inner.double(), target - before)
        token = torch.where(mass > 0, block * _BLOCK + index, -1)
        weight = torch.where(mass > 0, inner.gather(1, index).double(), 0.0)
        found = torch.cat((token.double(), weight, mass), dim=1).tolist()
        return [Drawn(int(t), w, m) for t, w, m in found]

    def _stack(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return rows [R, V] float32 on the device."""
        vocab = rows[0].shape
        for row in rows:
            if row.shape != vocab or row.dim() != 1 or not row.numel():
                raise KernelInputError(f"logits {tuple(row.shape)} must be {tuple(vocab)} and [V]")
            if row.dtype not in (torch.float32, torch.bfloat16):
                raise KernelInputError(f"logits {row.dtype} must be float32 or bfloat16")
        return torch.stack([row.to(self._device, torch.float32) for row in rows])


def _find(values: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each row's running sum passes its target, and the sum before; both [R, 1].

    Never where the value is 0, unless all are.
    """
    running = values.cumsum(dim=1)
    places = torch.arange(values.shape[1], device=values.device)
    last = torch.where(values > 0, places, 0).amax(dim=1, keepdim=True)
    index = torch.searchsorted(running, target, right=True).clamp_max(last)
    return index, running.gather(1, index) - values.gather(1, index)
