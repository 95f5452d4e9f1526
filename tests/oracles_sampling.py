"""The slow obvious sampler: full sort, float64, one filter after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvkeep.engine.api import SamplingParams


def edited_logits(
    logits: NDArray[np.float32], params: SamplingParams, prompt: list[int], output: list[int]
) -> NDArray[np.float64]:
    """Apply penalties and bias to logits `[V]` in float64."""
    out = logits.astype(np.float64)
    for token in range(len(out)):
        if token in prompt or token in output:
            factor = params.repetition_penalty
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        out[token] -= params.frequency_penalty * output.count(token)
        out[token] -= params.presence_penalty * (token in output)
    for token, bias in params.logit_bias:
        out[token] += bias
    return out


def token_probabilities(
    logits: NDArray[np.floating], params: SamplingParams
) -> NDArray[np.float64]:
    """Return the probabilities `[V]` that a token is drawn with."""
    scaled = logits.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0.0
    order = np.lexsort((np.arange(len(p)), -p))
    if params.top_k > 0:
        p[order[params.top_k :]] = 0.0
    p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    dropped = before >= params.top_p if params.top_p < 1.0 else np.zeros(len(p), bool)
    dropped[0] = False
    p[order[dropped]] = 0.0
    kept: NDArray[np.float64] = p / p.sum()
    return kept


def chi_square(counts: NDArray[np.int64], p: NDArray[np.float64]) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom; cells expecting under 5 are merged."""
    expected = p * counts.sum()
    small = expected < 5.0
    cells = [*zip(counts[~small], expected[~small], strict=True)]
    if expected[small].sum() > 0:
        cells.append((counts[small].sum(), expected[small].sum()))
    return sum((float(c) - e) ** 2 / e for c, e in cells), max(1, len(cells) - 1)


def chi_square_limit(freedom: int, sigmas: float = 4.5) -> float:
    """Return the statistic's bound at `sigmas` (Wilson and Hilferty's approximation)."""
    a = 2.0 / (9.0 * freedom)
    return float(freedom * (1.0 - a + sigmas * a**0.5) ** 3)
