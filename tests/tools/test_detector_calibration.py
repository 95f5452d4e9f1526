from __future__ import annotations

import random
from pathlib import Path

from tools.detector_data.calibration import PRIOR, Fit, Judged, calibrate, plot, reliability


def drawn(count: int) -> list[Judged]:
    rng = random.Random(4)
    found = []
    for at in range(count):
        sensitive = at % 4 == 0
        found.append(Judged(rng.gauss(2.0 if sensitive else -2.0, 1.5), sensitive, "en"))
    return found


def test_calibrated_scores_are_shares_at_the_stated_prior() -> None:
    found = drawn(8000)
    rows = reliability(found, calibrate(found))
    assert len(rows) >= 8
    assert all(abs(mean - share) < 0.12 for mean, share, weight in rows if weight > 0.002 * 8000)
    whole = sum(share * weight for _, share, weight in rows) / sum(weight for *_, weight in rows)
    assert abs(whole - PRIOR) < 1e-9


def test_a_larger_margin_never_scores_less() -> None:
    fit = calibrate(drawn(2000))
    assert fit.slope > 0
    scores = fit.scores([Judged(margin, False, "en") for margin in (-50.0, -1.0, 0.0, 1.0, 50.0)])
    assert list(scores) == sorted(scores)


def test_the_report_counts_both_bounds() -> None:
    fit = Fit(1.0, 0.0)
    found = [Judged(5, True, "en"), Judged(0, True, "en"), Judged(-5, False, "en")]
    text = fit.report(found)
    assert "not clear: recall 1.0000, false positives 0.0000" in text
    assert "taint: recall 0.5000" in text


def test_the_plot_is_the_same_each_time(tmp_path: Path) -> None:
    found = drawn(400)
    fit = calibrate(found)
    plot(found, fit, tmp_path / "a.svg")
    plot(found, fit, tmp_path / "b" / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b" / "b.svg").read_bytes()
