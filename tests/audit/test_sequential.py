from __future__ import annotations

import math

import numpy as np
import pytest

from kvkeep.audit.sequential import MIN_PAIRS, Rates, decide, log_likelihood_ratio, weigh
from kvkeep.audit.stats import Samples

LOOKS = range(8, 401, 8)


@pytest.mark.parametrize("pairs", [1, 7, 40])
def test_the_likelihood_ratio_is_one_on_average_under_a_fair_coin(pairs: int) -> None:
    mean = sum(
        math.comb(pairs, wins) * 0.5**pairs * math.exp(log_likelihood_ratio(wins, pairs - wins))
        for wins in range(pairs + 1)
    )
    assert mean == pytest.approx(1.0)


def test_wins_and_losses_weigh_alike() -> None:
    assert log_likelihood_ratio(30, 4) == log_likelihood_ratio(4, 30)
    assert log_likelihood_ratio(0, 0) == pytest.approx(0.0)


def test_false_alarms_stay_within_alpha_over_all_looks_under_drift_and_heavy_tails() -> None:
    """A walk, a Pareto tail, and a load that slows one of two: the coin alone decides."""
    chance, alarms, runs = np.random.default_rng(3), 0, 1000
    rates = Rates(alpha=0.2, margin=0.05)
    for _ in range(runs):
        times = np.cumsum(chance.standard_normal((LOOKS[-1], 1)), axis=0)
        times = times + chance.pareto(1.5, (LOOKS[-1], 2)) + [0.0, 5.0]
        coins = chance.integers(0, 2, LOOKS[-1])
        hits, misses = times[np.arange(LOOKS[-1]), coins], times[np.arange(LOOKS[-1]), 1 - coins]
        wins = np.cumsum(hits < misses)
        alarms += any(
            log_likelihood_ratio(int(wins[n - 1]), n - int(wins[n - 1])) >= -math.log(rates.level)
            for n in LOOKS
        )
    assert 0 < alarms / runs <= rates.alpha


def shifted(chance: np.random.Generator, auc: float, pairs: int) -> tuple[Samples, Samples]:
    """Return exponential times whose AUC is as given: rates r and 1 with r / (1 + r) = auc."""
    return chance.exponential((1 - auc) / auc, pairs), chance.exponential(1.0, pairs)


def verdict(hits: Samples, misses: Samples, rates: Rates) -> str | None:
    for pairs in range(8, hits.size + 1, 8):
        found = decide(weigh(hits[:pairs], misses[:pairs], rates.level), rates)
        if found is not None:
            return found
    return None


@pytest.mark.parametrize(("auc", "wanted", "least"), [(0.5, "clean", 0.9), (0.7, "leak", 0.97)])
def test_verdicts_at_a_margin_of_a_tenth(auc: float, wanted: str, least: float) -> None:
    chance, rates = np.random.default_rng(4), Rates(alpha=0.05, margin=0.1, channels=5)
    found = [verdict(*shifted(chance, auc, 600), rates) for _ in range(150)]
    assert found.count(wanted) / len(found) >= least
    # A leak of twice the margin is called clean with probability alpha / channels / 2 = 0.5 %.
    other = "leak" if wanted == "clean" else "clean"
    assert found.count(other) <= 3


def test_every_channel_pays_for_the_others() -> None:
    hits, misses = np.zeros(11), np.ones(11)
    assert decide(weigh(hits, misses, 0.05), Rates(0.05, 0.05, channels=1)) == "leak"
    assert decide(weigh(hits, misses, 0.05 / 40), Rates(0.05, 0.05, channels=40)) is None


def test_a_leak_of_slower_hits_is_a_leak_too() -> None:
    assert decide(weigh(np.ones(40), np.zeros(40), 0.05), Rates(0.05, 0.05)) == "leak"


def test_few_pairs_are_never_clean() -> None:
    wide = Rates(alpha=0.05, margin=0.49)
    chance = np.random.default_rng(5)
    few, enough = MIN_PAIRS - 1, MIN_PAIRS
    values = chance.standard_normal((2, enough))
    assert decide(weigh(values[0, :few], values[1, :few], 0.05), wide) is None
    assert decide(weigh(values[0], values[1], 0.05), wide) == "clean"


def test_drift_does_not_hurry_a_clean_verdict() -> None:
    """All pairs' AUC is narrow at once where times drift; the share of wins is not."""
    chance = np.random.default_rng(6)
    drift = np.linspace(0.0, 1000.0, 64)
    found = weigh(drift + chance.random(64), drift + chance.random(64), 0.05)
    assert found.auc.halfwidth < 0.05 < found.halfwidth
    assert decide(found, Rates(0.05, 0.05)) is None
