"""When an audit may stop: a test that holds at every look, and the width that ends it.

Which of two like prompts the victim sends is decided by a coin. Where the target does not react to
the victim, the side of a pair that answers first is that coin again, whatever the distribution of
times, the drift and the load. So the count of wins is binomial with 1/2, exactly, and the mixture
likelihood ratio below is a martingale: it exceeds 1/a at any look with probability a at most
(Ville). A leak verdict of one channel has that probability at a = alpha / channels, and any false
leak verdict of an audit alpha (Bonferroni).

A channel is clean when, at the same corrected level, the interval of its AUC over all pairs holds
0.5 and is no wider than the margin on each side. A leak that lifts the AUC to 0.5 + twice the
margin is then missed with probability alpha / channels / 2, about. Where times drift by more than a
hit saves, that AUC is narrow for nothing, so the share of pairs won has to hold 0.5 as well, within
twice the margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from kvkeep.audit.stats import (
    Auc,
    KolmogorovSmirnov,
    Samples,
    kolmogorov_smirnov,
    paired_auc,
    win_share,
)

Decision = Literal["leak", "clean"]

PRIORS: Final = (1.0, 16.0)
"""Beta(a, a) over the probability of a win: any leak, and a small one."""
WON_MARGINS: Final = 2.0
"""Margins that the share of wins may be wide."""
MIN_PAIRS: Final = 32
"""Before which no channel is clean."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The error rates of one audit."""

    alpha: float
    """Probability of any false leak verdict."""
    margin: float
    """Half-width of the AUC's interval at which a channel can be clean."""
    channels: int = 1

    @property
    def level(self) -> float:
        """Return what one channel may spend."""
        return self.alpha / self.channels


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the pairs so far say."""

    pairs: int
    wins: int
    losses: int
    log_e: float
    """Natural logarithm of the likelihood ratio against a fair coin."""
    auc: Auc
    """Over all pairs."""
    won: Auc
    """Inside pairs."""
    ks: KolmogorovSmirnov

    @property
    def halfwidth(self) -> float:
        """Return what the margin is held against."""
        return max(self.auc.halfwidth, self.won.halfwidth / WON_MARGINS)


def log_likelihood_ratio(wins: int, losses: int) -> float:
    """Return the logarithm of the mixture likelihood ratio of a coin against a fair one."""
    parts = [
        _log_beta(a + wins, a + losses) - _log_beta(a, a) + (wins + losses) * math.log(2.0)
        for a in PRIORS
    ]
    top = max(parts)
    return top + math.log(sum(math.exp(part - top) for part in parts) / len(parts))


def weigh(hits: Samples, misses: Samples, level: float) -> Evidence:
    """Return the evidence of at least two pairs; a tie says nothing about the coin."""
    wins = int(np.count_nonzero(hits < misses))
    losses = int(np.count_nonzero(hits > misses))
    return Evidence(
        pairs=int(hits.size),
        wins=wins,
        losses=losses,
        log_e=log_likelihood_ratio(wins, losses),
        auc=paired_auc(hits, misses, level),
        won=win_share(hits, misses, level),
        ks=kolmogorov_smirnov(hits, misses),
    )


def decide(evidence: Evidence, rates: Rates) -> Decision | None:
    """Return the verdict that the evidence allows, None where more pairs are needed."""
    if evidence.log_e >= -math.log(rates.level):
        return "leak"
    narrow = evidence.pairs >= MIN_PAIRS and evidence.halfwidth <= rates.margin
    chance = evidence.auc.holds_chance and evidence.won.holds_chance
    return "clean" if narrow and chance else None


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
