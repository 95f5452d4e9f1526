"""Draw a token from a row of logits: exact top-k, top-p and min-p without sorting the vocabulary.

The row is laid out as [B, C] with B = 128 and id = b * C + c, so that sums and maxima over B run at
memory speed.

    top_k:  the k-th largest of the C column maxima is at most the k-th largest logit; only the few
            logits that reach it are sorted.
    else:   draw from the whole distribution, then measure the mass before the token drawn (larger
            weight, or equal weight and lower id). Below top_p it is in the nucleus: take it.
            Otherwise keep only that mass and draw again. Whatever is taken is distributed as the
            nucleus (derived: rejection from a shrinking superset).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.types import FloatArray

_B: Final = 128
_LOG2E: Final = math.log2(math.e)
_MIN_EXPONENT: Final = -120.0
"""Smaller weights become 2^-120 of the largest: they never win a draw, and exp2 stays fast."""

_TINY: Final = 1e-300
"""A nucleus holds at least the first token, also where top_p is 0."""

Uniform = Callable[[int], float]
"""The t-th random number of this position, in (0, 1)."""


class RowDrawer:
    """Draws tokens from rows of `vocab_size` float32 logits.

    Holds the work memory of one row: large temporaries would be mapped and unmapped on every call.
    """

    def __init__(self, vocab_size: int) -> None:
        self._columns = -(-vocab_size // _B)
        self._vocab = vocab_size
        padded = self._columns * _B
        self._weights = np.zeros(padded, np.float32)
        self._spare = np.zeros(padded, np.float32)
        self._filled = np.full(padded, -np.inf, np.float32)
        self._mask = np.empty(padded, np.bool_)

    def draw(
        self,
        logits: FloatArray,
        uniform: Uniform,
        *,
        top: float,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> int:
        """Return one id from logits `[V]`, the largest of them `top`; -inf rules a token out.

        The filters apply in the order temperature (above 0), min_p, top_k, top_p; each renormalises
        what it keeps.
        """
        if 0 < top_k < self._vocab:
            ids = self.top_ids(logits, top_k)
            return _draw_sorted(ids, logits[ids], uniform(0), temperature, top_p, min_p)
        self._weigh(logits, top, temperature, min_p)
        return self._draw_nucleus(uniform, top_p)

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

    def _weigh(self, logits: FloatArray, top: float, temperature: float, min_p: float) -> None:
        """Set the weights to exp((logit - top) / temperature), 0 below `min_p`."""
        weights = self._weights[: self._vocab]
        scale = _LOG2E / temperature
        bottom = float(logits.min())
        np.multiply(logits, np.float32(scale), out=weights)
        np.subtract(weights, np.float32(scale) * np.float32(top), out=weights)
        if (bottom - top) * scale < _MIN_EXPONENT:
            np.clip(weights, np.float32(_MIN_EXPONENT), np.float32(0), out=weights)
        np.exp2(weights, out=weights)
        if min_p > 0.0:
            kept = np.greater_equal(weights, np.float32(min_p), out=self._mask[: self._vocab])
            np.multiply(weights, kept, out=weights)

    def _draw_nucleus(self, uniform: Uniform, top_p: float) -> int:
        limit = math.inf
        tries = 0
        while True:
            cumulative = np.cumsum(
                np.add.reduce(self._weights.reshape(_B, -1), axis=0), dtype=np.float64
            )
            if tries == 0 and top_p < 1.0:
                limit = max(top_p * float(cumulative[-1]), _TINY)
            token = self._pick(cumulative, uniform(tries))
            if limit == math.inf or self._starts_before(token, limit):
                return token
            self._weights, self._spare = self._spare, self._weights
            tries += 1

    def _pick(self, cumulative: NDArray[np.float64], u: float) -> int:
        """Return the id at which the running sum, column by column, passes `u` of the total."""
        target = u * float(cumulative[-1])
        column = min(int(cumulative.searchsorted(target, side="right")), self._columns - 1)
        inner = np.cumsum(self._weights[column :: self._columns], dtype=np.float64)
        rest = target - (float(cumulative[column - 1]) if column else 0.0)
        rest = min(max(rest, float(inner[-1]) * 1e-18), float(inner[-1]) * (1.0 - 1e-15))
        return int(inner.searchsorted(rest, side="right")) * self._columns + column

    def _starts_before(self, token: int, limit: float) -> bool:
        """Tell whether the mass before `token` is below `limit`; leaves it in the spare row."""
        weight = self._weights[token]
        _keep_above(self._weights, float(weight), self._spare)
        mass = float(np.einsum("i->", self._spare))
        if mass < limit:
            ties = np.equal(self._weights[:token], weight, out=self._mask[:token])
            mass += np.count_nonzero(ties) * float(weight)
            if mass >= limit:
                self._spare[:token][ties] = weight
        return mass < limit


def _keep_above(values: FloatArray, bound: float, out: FloatArray) -> None:
    """Copy `values` to `out`, 0 where they are not above `bound`: torch does it in one pass."""
    torch.threshold(torch.from_numpy(values), bound, 0.0, out=torch.from_numpy(out))


def _draw_sorted(
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
