from __future__ import annotations

import pytest

from kvkeep.sharing.detector.spans import Span, Verdict


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        (0.0, Verdict.CLEAR),
        (0.299, Verdict.CLEAR),
        (0.3, Verdict.GREY),
        (0.7, Verdict.GREY),
        (0.701, Verdict.TAINT),
        (1.0, Verdict.TAINT),
        (float("nan"), Verdict.GREY),
    ],
)
def test_a_score_between_the_thresholds_is_grey(score: float, verdict: Verdict) -> None:
    assert Span(0, 1, "email", "contact", score, "rule").verdict is verdict


def test_the_larger_verdict_is_the_worse_one() -> None:
    assert max(Verdict.CLEAR, Verdict.TAINT, Verdict.GREY) is Verdict.TAINT
