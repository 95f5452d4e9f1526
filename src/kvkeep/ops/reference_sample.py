"""Reference sampling: numpy, whole rows at a time; what kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.ops.layout import Drawn, DrawRow, Largest
from kvkeep.types import FloatArray

_BLOCK: Final = 512
_MIN_EXPONENT: Final = np.float32(-120.0)


class ReferenceSample:
    """`SampleOps` in plain numpy."""

    def largest(self, rows: Sequence[torch.Tensor]) -> list[Largest]:
        """Return the largest of each row of logits [V], float32 or bfloat16."""
        found = []
        for row in rows:
            logits = row.float().numpy()
            token = int(logits.argmax())
            found.append(Largest(token, float(logits[token])))
        return found

    def draw(self, rows: Sequence[DrawRow]) -> list[Drawn]:
        """Draw an id per row; the same id for any number of threads."""
        return [_draw(row) for row in rows]


def _draw(row: DrawRow) -> Drawn:
    weights = _kept_weights(row)
    padded = np.zeros(-(-len(weights) // _BLOCK) * _BLOCK, np.float32)
    padded[: len(weights)] = weights
    blocks = padded.reshape(-1, _BLOCK)
    sums = blocks.sum(axis=1).astype(np.float64)
    mass = float(sums.sum())
    if mass == 0.0:
        return Drawn(-1, 0.0, 0.0)
    block, before = _find(sums, row.uniform * mass)
    index, _ = _find(blocks[block].astype(np.float64), row.uniform * mass - before)
    return Drawn(block * _BLOCK + index, float(blocks[block, index]), mass)


def _kept_weights(row: DrawRow) -> FloatArray:
    logits = row.logits.float().numpy()
    with np.errstate(over="ignore"):  # -inf, and what the temperature takes beyond float32
        exponents = (logits - np.float32(row.top)) * np.float32(row.scale)
    weights: FloatArray = np.exp2(np.maximum(exponents, _MIN_EXPONENT))
    bound = np.float32(row.bound)
    kept = weights > bound
    kept[: row.ties] |= weights[: row.ties] == bound
    return weights * kept


def _find(values: NDArray[np.float64], target: float) -> tuple[int, float]:
    """Return where the running sum passes `target`, and the sum before; never where it is 0."""
    running = np.cumsum(values)
    last = int(np.flatnonzero(values)[-1])
    index = min(int(running.searchsorted(target, side="right")), last)
    return index, float(running[index] - values[index])
