from __future__ import annotations

from itertools import combinations, product
from statistics import NormalDist

import numpy as np
import pytest

from kvkeep.audit.stats import kolmogorov_smirnov, paired_auc, placements, win_share


def enumerated_p(n: int, k: int) -> float:
    """Return P(D+ >= k / n) by trying every arrangement of two samples of n."""
    hits_of = list(combinations(range(2 * n), n))
    reached = 0
    for hits in hits_of:
        ahead = most = 0
        for place in range(2 * n):
            ahead += 1 if place in hits else -1
            most = max(most, ahead)
        reached += most >= k
    return reached / len(hits_of)


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in (1, 2, 4, 6) for k in range(n + 1)])
def test_kolmogorov_smirnov_is_what_counting_every_arrangement_says(n: int, k: int) -> None:
    # k hits lead, then the two alternate: the largest lead is k (0: misses lead throughout).
    order = [0] * k + [1, 0] * (n - k) + [1] * k
    hits = np.array([i for i, side in enumerate(order) if side == 0], float)
    misses = np.array([i for i, side in enumerate(order) if side == 1], float)
    found = kolmogorov_smirnov(hits, misses)
    assert found.statistic == pytest.approx(k / n)
    assert found.p == pytest.approx(enumerated_p(n, k))


def test_kolmogorov_smirnov_looks_one_way() -> None:
    early, late = np.arange(50.0), np.arange(50.0) + 100
    assert kolmogorov_smirnov(early, late).p < 1e-25
    assert kolmogorov_smirnov(late, early).p == 1.0
    assert kolmogorov_smirnov(early, early).statistic == 0.0


def test_placements_count_ties_half() -> None:
    values, among = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 3.0, 0.0])
    wanted = [np.mean([(a > v) + 0.5 * (a == v) for a in among]) for v in values]
    assert placements(values, among).tolist() == wanted


def test_the_auc_is_the_share_of_all_pairs_of_pairs() -> None:
    chance = np.random.default_rng(0)
    hits, misses = chance.integers(0, 9, (2, 40)).astype(float)
    wanted = np.mean([(h < m) + 0.5 * (h == m) for h, m in product(hits, misses)])
    assert paired_auc(hits, misses, 0.05).value == pytest.approx(wanted)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_the_interval_holds_the_closed_form_as_often_as_it_says(shift: float, drift: float) -> None:
    """AUC of two normals is Phi(shift / sqrt(2 (1 + drift^2))), pairs sharing their drift."""
    truth = NormalDist().cdf(shift / np.sqrt(2 * (1 + drift**2)))
    chance = np.random.default_rng(1)
    runs, held = 400, 0
    for _ in range(runs):
        common = drift * chance.standard_normal(120)
        hits, misses = chance.standard_normal((2, 120)) + common
        found = paired_auc(hits - shift, misses, 0.1)
        held += found.low <= truth <= found.high
    assert 0.85 <= held / runs <= 0.95


def test_drift_hides_a_leak_from_the_auc_and_not_from_the_share_of_wins() -> None:
    chance = np.random.default_rng(2)
    common = 100.0 * chance.standard_normal(300)
    hits, misses = common - 1.0, common.copy()
    assert paired_auc(hits, misses, 0.05).holds_chance or paired_auc(hits, misses, 0.05).low < 0.52
    assert win_share(hits, misses, 0.05).low > 0.9


def test_ties_alone_leave_the_width_that_the_number_of_pairs_allows() -> None:
    same = np.zeros(64)
    for found in (paired_auc(same, same, 0.01), win_share(same, same, 0.01)):
        assert found.value == 0.5
        assert found.halfwidth == pytest.approx((1 - 0.01 ** (1 / 64)) / 2)


@pytest.mark.parametrize("size", [0, 1])
def test_one_pair_has_no_interval(size: int) -> None:
    with pytest.raises(ValueError, match="two pairs"):
        win_share(np.zeros(size), np.zeros(size), 0.05)
    with pytest.raises(ValueError, match="equal size"):
        kolmogorov_smirnov(np.zeros(size), np.zeros(size + 1))
