from __future__ import annotations

from dataclasses import replace

import pytest

from kvkeep.sharing.detector.catalogue import Rule
from kvkeep.sharing.detector.rules import RuleRecogniser, entropy_bits, words_pattern

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


def test_a_denying_word_just_before_wins() -> None:
    rule = replace(RULE, context=("code",), deny=("version",))
    assert found(rule, "code version 1234") == []
    assert found(rule, "version of the old code 1234") == [("1234", 1.0)]


def test_entropy_and_checks_are_conditions() -> None:
    assert found(replace(RULE, entropy=1.5), "1111 1234") == [("1234", 1.0)]
    assert found(replace(RULE, check=("luhn", "placed")), "1111 1804") == [("1804", 1.0)]


def test_words_without_spaces_between_them_count_anywhere() -> None:
    pattern = words_pattern(["住所", "tel", "*weg"])
    assert pattern.search("私の住所は".encode()) is not None
    assert pattern.search(b"hotel") is None
    assert pattern.search(b"TEL.") is not None
    assert pattern.search(b"birkenweg 3") is not None


def test_the_version_changes_with_the_rules() -> None:
    one, two = RuleRecogniser([RULE]), RuleRecogniser([replace(RULE, score=0.8)])
    assert one.version == RuleRecogniser([RULE]).version != two.version
