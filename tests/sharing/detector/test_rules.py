from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvkeep.sharing.detector.catalogue import Rule, shipped_rules
from kvkeep.sharing.detector.normalise import views
from kvkeep.sharing.detector.patterns import Hit, Pattern
from kvkeep.sharing.detector.rules import RuleRecogniser, entropy_bits, words_pattern
from kvkeep.sharing.detector.rules import _Compiled as Compiled
from kvkeep.sharing.detector.rules import _onward as onward
from kvkeep.sharing.detector.rules import _score as score
from kvkeep.sharing.detector.spans import Span
from tests.sharing.detector.corpus import texts

RULE = Rule("r", "thing", "identifier", "[0-9]{4}", "derived")


def found(rule: Rule, text: str) -> list[tuple[str, float]]:
    return [(text[s.start : s.end], s.score) for s in RuleRecogniser([rule]).spans(text)]


def test_entropy_is_in_bits_per_character() -> None:
    assert entropy_bits("aaaa") == 0
    assert entropy_bits("abcd") == 2


@pytest.mark.parametrize(
    ("edge", "text", "hit"),
    [
        ("word", "a1234", False),
        ("word", "1234b", False),
        ("word", "は1234で", True),
        ("word", "ї1234", False),
        ("word", "-1234-", True),
        ("digit", "a1234b", True),
        ("digit", "12345", False),
        ("number", "12 3456", False),
        ("number", "3456-1", False),
        ("number", "1.3456", False),
        ("number", ". 3456 a", True),
        ("none", "12345", True),
    ],
)
def test_edges(edge: str, text: str, hit: bool) -> None:
    pattern = "3456" if "3456" in text and edge == "number" else "[0-9]{4}"
    assert bool(found(replace(RULE, edge=edge, pattern=pattern), text)) is hit


def test_a_failed_match_does_not_hide_a_later_one() -> None:
    rule = replace(RULE, pattern=r"[0-9](?: ?[0-9]){3}", check=("luhn",))
    assert found(rule, "9 1 8 0 0") == [("1 8 0 0", 1.0)]


def test_context_counts_within_reach_only() -> None:
    rule = replace(RULE, context=("code", "чек*"), reach=10)
    assert found(rule, "code 1234") == [("1234", 1.0)]
    assert found(rule, "1234 is the code") == []
    assert found(rule, "чеком 1234") == [("1234", 1.0)]
    assert found(rule, "decode 1234 codes") == []
    assert found(replace(rule, alone=0.4), "1234") == [("1234", 0.4)]
    assert found(replace(rule, edge="digit"), "1234code") == [("1234", 1.0)]


def test_a_denying_word_just_before_wins() -> None:
    rule = replace(RULE, context=("code",), deny=("version",))
    assert found(rule, "code version 1234") == []
    assert found(rule, "version of the old code 1234") == [("1234", 1.0)]


def test_entropy_and_checks_are_conditions() -> None:
    assert found(replace(RULE, entropy=1.5), "1111 1234") == [("1234", 1.0)]
    assert found(replace(RULE, check=("luhn", "placed")), "1111 1804") == [("1804", 1.0)]


def test_words_without_spaces_between_them_count_anywhere() -> None:
    pattern = Pattern(words_pattern(["住所", "tel", "*weg"]))
    assert pattern.search("私の住所は".encode()) is not None
    assert pattern.search(b"hotel") is None
    assert pattern.search(b"TEL.") is not None
    assert pattern.search(b"birkenweg 3") is not None


def test_the_version_changes_with_the_rules() -> None:
    one, two = RuleRecogniser([RULE]), RuleRecogniser([replace(RULE, score=0.8)])
    assert one.version == RuleRecogniser([RULE]).version != two.version


def slowly(compiled: Compiled, text: str) -> Iterator[Span]:
    """Yield what a rule finds, tried again from every character behind one that failed."""
    rule, data, start = compiled.rule, text.encode(), 0
    while (hit := compiled.pattern.search(data, start)) is not None:
        begin, end = (len(data[:at].decode()) for at in hit.value)
        value = score(compiled, text, begin, end)
        if value > 0:
            yield Span(begin, end, rule.kind, rule.category, value, "rule")
        start = max(hit.value[1], hit.start + 1) if value > 0 else hit.start + 1


def counted(recogniser: RuleRecogniser, each: list[Compiled], text: str) -> int:
    """Return how many spans every rule finds by itself; what all find together is the same."""
    oracle = [(c.rule, span) for c in each for span in slowly(c, text)]
    assert recogniser.explained(text) == oracle
    return len(oracle)


def test_all_rules_together_find_what_each_finds_alone() -> None:
    rules = shipped_rules()
    recogniser, each = RuleRecogniser(rules), [Compiled(rule) for rule in rules]
    found = sum(
        counted(recogniser, each, view.text)
        for text in texts(120, seed=7, hard=True)
        for view in views(text)
    )
    assert found > 90


@pytest.mark.parametrize(
    ("edge", "text", "hits"),
    [
        ("word", "a1234 1234", ["1234"]),
        ("digit", "12345a1234", ["1234"]),
        ("number", "12 12345-1234 5678", []),
        ("number", "12345a1234 ", ["1234"]),
        ("none", "123456", ["1234"]),
    ],
)
def test_what_failed_is_not_sought_inside_its_first_word(
    edge: str, text: str, hits: list[str]
) -> None:
    compiled = Compiled(replace(RULE, edge=edge))
    oracle = [text[span.start : span.end] for span in slowly(compiled, text)]
    assert oracle == [value for value, _ in found(compiled.rule, text)] == hits


@pytest.mark.parametrize(
    ("rule", "next_start"),
    [
        (RULE, 9),
        (replace(RULE, edge="digit"), 8),
        (replace(RULE, edge="number"), 8),
        (replace(RULE, edge="none"), 1),
        (replace(RULE, pattern="([0-9]{4})"), 1),
        (replace(RULE, pattern="-?[0-9]{4}"), 1),
    ],
)
def test_what_failed_inside_a_run_goes_on_behind_it(rule: Rule, next_start: int) -> None:
    data = b"-2345678a 1" if rule.pattern.startswith("-") else b"12345678a 1"
    hit = Hit(0, 4, (0, 4))
    assert onward(Compiled(rule), data, hit, found=False) == next_start
    assert onward(Compiled(rule), data, hit, found=True) == 4


@pytest.mark.slow
def test_all_rules_together_find_what_each_finds_alone_in_many_texts() -> None:
    rules = shipped_rules()
    recogniser, each = RuleRecogniser(rules), [Compiled(rule) for rule in rules]
    for text in texts(10_000, seed=8, hard=True):
        for view in views(text):
            counted(recogniser, each, view.text)


def test_a_rule_is_skipped_where_its_only_context_is_missing() -> None:
    near = replace(RULE, id="near", context=("code",))
    grey = replace(near, id="grey", alone=0.4)
    recogniser = RuleRecogniser([near, grey, replace(near, id="other", context=("token",))])
    data = b"the code 1234"
    assert [c.rule.id for c in recogniser._candidates(b"x 1234")] == ["grey"]
    assert [c.rule.id for c in recogniser._candidates(data)] == ["near", "grey"]
    assert recogniser._candidates(b"the code") == []
