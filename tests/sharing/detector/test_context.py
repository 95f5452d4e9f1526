from __future__ import annotations

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.context import ContextRules
from kvkeep.sharing.detector.spans import Span, Verdict


def span(start: int, category: str, score: float = 0.5, source: str = "scorer") -> Span:
    return Span(start, start + 10, "x", category, score, source)


@pytest.mark.parametrize(
    ("found", "taints"),
    [
        ([], []),
        ([span(0, "person")], []),
        ([span(0, "person"), span(50, "person")], []),
        ([span(0, "person"), span(50, "date")], [(0, 60)]),
        ([span(50, "date"), span(0, "location")], [(0, 60)]),
        ([span(0, "employer"), span(100, "health")], [(0, 110)]),
        ([span(0, "person"), span(266, "date")], [(0, 276)]),
        ([span(0, "person"), span(267, "date")], []),
        ([span(0, "person"), span(20, "contact")], []),
        ([span(0, "person"), span(20, "credential"), span(40, "health")], [(0, 50)]),
        ([span(0, "person", 0.29), span(20, "date")], []),
        ([span(0, "person", 0.3), span(20, "date", 0.3)], [(0, 30)]),
        ([span(0, "person"), span(20, "date"), span(40, "person")], [(0, 30), (20, 50)]),
        ([span(0, "person", 0.9, "context"), span(20, "date")], []),
    ],
)
def test_two_kinds_of_quasi_identifier_near_each_other_taint(
    found: list[Span], taints: list[tuple[int, int]]
) -> None:
    combined = ContextRules().combine(found)
    assert [(one.start, one.end) for one in combined] == taints
    assert all(one.verdict is Verdict.TAINT and one.source == "context" for one in combined)


def test_three_may_be_asked_for() -> None:
    rules = ContextRules(needed=3)
    two = [span(0, "person"), span(20, "date")]
    assert rules.combine(two) == []
    assert [one.start for one in rules.combine([*two, span(40, "health")])] == [0]


def test_distance_and_categories_can_be_set() -> None:
    rules = ContextRules(frozenset({"person", "date"}), within_tokens=5)
    assert rules.combine([span(0, "person"), span(31, "date")]) == []
    assert len(rules.combine([span(0, "person"), span(30, "date")])) == 1
    assert rules.combine([span(0, "person"), span(12, "health")]) == []


def test_combining_clears_nothing() -> None:
    alone = [span(0, "person", 0.5)]
    combined = ContextRules().combine(alone)
    assert max(one.verdict for one in [*alone, *combined]) is Verdict.GREY


@pytest.mark.parametrize(
    ("categories", "needed", "within", "word"),
    [
        (frozenset({"person", "colour"}), 2, 64, "colour"),
        (frozenset({"person", "date"}), 3, 64, "needed"),
        (frozenset({"person", "date"}), 1, 64, "needed"),
        (frozenset({"person", "date"}), 2, 0, "within_tokens"),
    ],
)
def test_rules_that_make_no_sense_are_refused(
    categories: frozenset[str], needed: int, within: int, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        ContextRules(categories, needed, within)
