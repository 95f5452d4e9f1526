"""What two paired samples say: AUC with an interval, and the one-sided Kolmogorov-Smirnov test."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]


class Auc(NamedTuple):
    """P(hit < miss) + P(hit = miss) / 2, and half the width of its two-sided interval.

    0.5 is chance.
    """

    value: float
    halfwidth: float

    @property
    def low(self) -> float:
        """Return the interval's lower end."""
        return max(0.0, self.value - self.halfwidth)

    @property
    def high(self) -> float:
        """Return the interval's upper end."""
        return min(1.0, self.value + self.halfwidth)

    @property
    def holds_chance(self) -> bool:
        """Tell whether 0.5 lies inside the interval."""
        return self.low <= 0.5 <= self.high


class KolmogorovSmirnov(NamedTuple):
    """The largest excess of the hits' distribution function over the misses', and its p-value."""

    statistic: float
    p: float


def placements(values: Samples, among: Samples) -> Samples:
    """Return for each value the share of `among` that is larger, ties counting half."""
    ordered = np.sort(among)
    below = np.searchsorted(ordered, values, side="left")
    through = np.searchsorted(ordered, values, side="right")
    return 1.0 - (below + through) / (2.0 * ordered.size)


def paired_auc(hits: Samples, misses: Samples, level: float) -> Auc:
    """Return the AUC of n pairs with an interval of error probability `level`.

    DeLong's variance with the covariance that pairs have: what drifts over time moves both sides of
    a pair.
    """
    of_hits = placements(hits, misses)
    of_misses = 1.0 - placements(misses, hits)
    halfwidth = _halfwidth(of_hits + of_misses, level)
    return Auc(float(of_hits.mean()), halfwidth)


def win_share(hits: Samples, misses: Samples, level: float) -> Auc:
    """Return P(hit < miss) inside a pair, ties counting half.

    Equal to the AUC where pairs are alike; where times drift by more than a hit saves, the AUC over
    all pairs goes to 0.5 and this does not.
    """
    won = np.where(hits == misses, 0.5, hits < misses)
    halfwidth = _halfwidth(won, level)
    return Auc(float(won.mean()), halfwidth)


def _halfwidth(scores: Samples, level: float) -> float:
    """Return the half-width of a mean's interval.

    Never less than what n pairs without one discordance would allow (all ties, or all wins):
    P(discordant) <= 1 - level ** (1 / n).
    """
    n = scores.size
    if n < 2:
        raise ValueError("an interval needs at least two pairs")
    floor = (1.0 - math.exp(math.log(level) / n)) / 2.0
    spread = math.sqrt(float(np.var(scores, ddof=1)) / n)
    return max(NormalDist().inv_cdf(1.0 - level / 2.0) * spread, floor)


def kolmogorov_smirnov(hits: Samples, misses: Samples) -> KolmogorovSmirnov:
    """Return the one-sided two-sample test that hits are smaller, for samples of equal size.

    P(D+ >= k / n) = C(2n, n + k) / C(2n, n) exactly without ties (Gnedenko and Korolyuk); with ties
    it is an upper bound.
    """
    n = hits.size
    if n == 0 or misses.size != n:
        raise ValueError("the test needs two samples of equal size")
    points = np.concatenate([hits, misses])
    ahead = np.searchsorted(np.sort(hits), points, side="right") - np.searchsorted(
        np.sort(misses), points, side="right"
    )
    k = max(0, int(ahead.max()))
    log_p = 2 * math.lgamma(n + 1) - math.lgamma(n + k + 1) - math.lgamma(n - k + 1)
    return KolmogorovSmirnov(k / n, math.exp(log_p))
