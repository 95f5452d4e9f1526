"""Draw tokens from rows of logits: exact top-k, top-p and min-p without sorting the vocabulary.

top_k:  seen as [B, C] with B = 128, the k-th largest of the C column maxima is at most the k-th
        largest logit; only the few logits that reach it are sorted.
else:   draw from the whole distribution, then measure the mass before the token drawn (larger
        weight, or equal weight and lower id). Below top_p it is in the nucleus: take it.
        Otherwise keep only that mass and draw again. Whatever is taken is distributed as the
        nucleus (derived: rejection from a shrinking superset).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.ops.layout import DrawRow, SampleOps
from kvkeep.types import FloatArray

_B: Final = 128
_LOG2E: Final = math.log2(math.e)

_TINY: Final = 1e-300
"""A nucleus holds at least the first token, also where top_p is 0."""

Uniform = Callable[[int], float]
"""The t-th random number of this position, in (0, 1)."""


class Nucleus(NamedTuple):
    """What to draw from a row without top_k; each filter renormalises what it keeps."""

    logits: torch.Tensor
    """[V] float32 or bfloat16, the largest of them `top`; -inf rules a token out."""
    top: float
    temperature: float
    """Above 0; applied first, then min_p, then top_p."""
    min_p: float
    top_p: float
    uniform: Uniform


def draw_nuclei(ops: SampleOps, rows: Sequence[Nucleus]) -> list[int]:
    """Return one id per row, each by its own numbers alone."""
    tokens = [-1] * len(rows)
    limits = [math.inf] * len(rows)
    waiting = list(range(len(rows)))
    draws = [_first_draw(row) for row in rows]
    tries = 0
    while waiting:
        again = []
        for index, drawn in zip(waiting, ops.draw([draws[i] for i in waiting]), strict=True):
            row = rows[index]
            if tries > 0 and drawn.mass < limits[index]:
                continue
            tokens[index] = drawn.token
            if row.top_p >= 1.0:
                continue
            if tries == 0:
                limits[index] = max(row.top_p * drawn.mass, _TINY)
            draws[index] = draws[index]._replace(
                bound=drawn.weight, ties=drawn.token, uniform=row.uniform(tries + 1)
            )
            again.append(index)
        waiting = again
        tries += 1
    return tokens


def _first_draw(row: Nucleus) -> DrawRow:
    scale = _LOG2E / row.temperature
    vocab = row.logits.shape[0]
    return DrawRow(row.logits, row.top, scale, row.min_p, vocab, row.uniform(0))


class RowRanker:
    """Ranks and measures rows of `vocab_size` float32 logits.

    Holds the work memory of one row: large temporaries would be mapped and unmapped on every call.
    """

    def __init__(self, vocab_size: int) -> None:
        self._columns = -(-vocab_size // _B)
        self._vocab = vocab_size
        padded = self._columns * _B
        self._spare = np.zeros(padded, np.float32)
        self._filled = np.full(padded, -np.inf, np.float32)
        self._mask = np.empty(padded, np.bool_)

    def top_ids(self, logits: FloatArray, k: int) -> NDArray[np.intp]:
        """Return the ids of the `k` largest logits, largest first, equal ones by lowest id."""
        if k < self._columns:
            self._filled[: self._vocab] = logits
            maxima = np.maximum.reduce(self._filled.reshape(_B, -1), axis=0)
            bound = np.partition(maxima, self._columns - k)[self._columns - k]
        elif k < self._vocab:
            bound = np.partition(logits, self._vocab - k)[self._vocab - k]
        else:
            bound = np.float32(-np.inf)
        ids = np.flatnonzero(np.greater_equal(logits, bound, out=self._mask[: self._vocab]))
        return ids[np.lexsort((ids, -logits[ids]))[:k]]

    def log_total(self, logits: FloatArray) -> float:
        """Return the natural log of the sum of exp over logits `[V]`, the largest finite."""
        top, work = logits.max(), self._spare[: self._vocab]
        np.subtract(logits, top, out=work)
        np.exp(work, out=work)
        total = np.add.reduce(self._spare.reshape(_B, -1), axis=0).sum(dtype=np.float64)
        return float(top) + math.log(float(total))


def draw_sorted(
    ids: NDArray[np.intp],
    logits: FloatArray,
    u: float,
    temperature: float,
    top_p: float,
    min_p: float,
) -> int:
    """Return one of `ids`, whose logits come in descending order."""
    scaled = (logits.astype(np.float64) - float(logits[0])) / temperature
    weights = np.exp(scaled)
    kept = int(np.count_nonzero(weights >= min_p))
    cumulative = np.cumsum(weights[:kept])
    if top_p < 1.0:
        kept = 1 + int(cumulative[:-1].searchsorted(top_p * cumulative[-1], side="left"))
    target = u * float(cumulative[kept - 1])
    return int(ids[min(int(cumulative.searchsorted(target, side="right")), kept - 1)])
