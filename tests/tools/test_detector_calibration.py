from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tools.detector_data import calibration
from tools.detector_data.calibration import (
    BUDGET,
    PRIOR,
    PROSE_BUDGET,
    Fit,
    Judged,
    calibrate,
    plot,
    reliability,
)

KINDS = ("person_name", "diagnosis")
NONE: frozenset[str] = frozenset()


def drawn(count: int) -> list[Judged]:
    rng = random.Random(4)
    found = []
    for at in range(count):
        kinds = frozenset({KINDS[at % 8 // 4]} if at % 4 == 0 else ())
        odds = tuple(rng.gauss(2.0 if kind in kinds else -2.0, 1.5) for kind in KINDS)
        found.append(Judged(odds, kinds, prose=at % 4 == 1))
    return found


def test_wrongly_flagged_text_stays_within_both_budgets() -> None:
    found = drawn(8000)
    scores = calibrate(found, KINDS, NONE).scores(found)
    for prose, budget in ((False, BUDGET), (True, PROSE_BUDGET)):
        chosen = [s for s, one in zip(scores, found) if not one.kinds and one.prose is prose]
        assert float(np.mean(np.array(chosen) > 0.3 + 1e-6)) <= budget
    held = [s for s, one in zip(scores, found) if one.kinds]
    assert float(np.mean(np.array(held) > 0.3)) > 0.3


def test_the_plots_bins_add_up_to_the_prior() -> None:
    found = drawn(4000)
    rows = reliability(found, calibrate(found, KINDS, NONE))
    assert len(rows) >= 5
    whole = sum(share * weight for _, share, weight in rows) / sum(weight for *_, weight in rows)
    assert abs(whole - PRIOR) < 1e-9


def test_a_kind_that_is_often_mistaken_needs_larger_odds() -> None:
    found = drawn(4000)
    noisy = [
        one._replace(odds=(one.odds[0], one.odds[1] + (5.0 if at % 3 == 0 else 0.0)))
        for at, one in enumerate(found)
    ]
    clean, wary = calibrate(found, KINDS, NONE), calibrate(noisy, KINDS, NONE)
    assert -wary.offsets[1] / wary.slopes[1] > -clean.offsets[1] / clean.slopes[1] + 0.5


def test_larger_odds_never_score_less() -> None:
    fit = calibrate(drawn(2000), KINDS, NONE)
    assert min(fit.slopes) > 0
    scores = fit.scores([Judged((odds, odds), NONE) for odds in (-50.0, -1.0, 0.0, 1.0, 50.0)])
    assert list(scores) == sorted(scores)


def test_a_silent_kind_never_scores() -> None:
    found = drawn(2000)
    fit = calibrate(found, KINDS, frozenset({"diagnosis"}))
    assert fit.scores([Judged((-50.0, 50.0), NONE)])[0] < 1e-9
    assert fit.scores([Judged((50.0, -50.0), NONE)])[0] > 0.9


def test_the_report_counts_both_bounds() -> None:
    named = frozenset({"person_name"})
    found = [Judged((5,), named), Judged((0,), named), Judged((-5,), frozenset())]
    text = Fit([1.0], [0.0]).report(found)
    assert "not clear: recall 1.0000, false positives 0.0000" in text
    assert "taint: recall 0.5000" in text


def test_the_plot_is_the_same_each_time(tmp_path: Path) -> None:
    found = drawn(400)
    fit = calibrate(found, KINDS, NONE)
    plot(found, fit, tmp_path / "a.svg")
    plot(found, fit, tmp_path / "b" / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b" / "b.svg").read_bytes()


def test_the_budget_goes_on_what_rules_miss() -> None:
    found = drawn(2000)
    known = [one._replace(known="person_name" in one.kinds) for one in found]
    fair, mindful = calibrate(found, KINDS, NONE), calibrate(known, KINDS, NONE)
    place = KINDS.index("person_name")
    assert mindful.offsets[place] < fair.offsets[place]


def test_what_rules_flag_wrongly_is_not_charged_to_the_scorer() -> None:
    found = drawn(2000)
    loud = [
        one._replace(odds=(9.0, 9.0), known=True) if not one.kinds and at % 20 == 3 else one
        for at, one in enumerate(found)
    ]
    charged = [one._replace(known=False) for one in loud]
    scores = [Judged((4.0, 4.0), NONE)]
    assert calibrate(loud, KINDS, NONE).scores(scores) > 0.3
    assert calibrate(charged, KINDS, NONE).scores(scores) < 0.3


def test_a_part_of_a_prompt_lets_no_bound_stand_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight parts among thousands of lookalikes would cost nothing if they had no budget."""
    parts = [Judged((4.0, -2.0), NONE, prompt=True) for _ in range(8)]
    found = [*drawn(8000), *parts]
    assert calibrate(found, KINDS, NONE).scores(parts).max() <= 0.3 + 1e-6
    monkeypatch.setattr(calibration, "PROMPT_BUDGET", 9.0)
    assert calibrate(found, KINDS, NONE).scores(parts).min() > 0.3
