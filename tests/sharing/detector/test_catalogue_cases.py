"""Every rule against its table: what it finds, what it leaves, whole and split anywhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kvkeep.sharing.detector.catalogue import Rule, shipped_rules
from kvkeep.sharing.detector.normalise import LOOKALIKES, views
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import Detector

CASES = Path(__file__).parent / "cases"
MARKED = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
RULES = {rule.id: rule for rule in shipped_rules()}
TABLE = {
    rule: case
    for path in sorted(CASES.glob("*.toml"))
    for rule, case in tomllib.loads(path.read_text(encoding="utf-8")).items()
}


def cases(column: str) -> list[tuple[str, str]]:
    return [(rule, text) for rule, case in TABLE.items() for text in case[column]]


@cache
def alone(rule: str) -> RuleRecogniser:
    return RuleRecogniser([RULES[rule]])


def test_every_rule_has_true_and_false_cases() -> None:
    assert TABLE.keys() == RULES.keys()
    assert all(case["found"] and case["clear"] for case in TABLE.values())


@pytest.mark.parametrize(("rule", "marked"), cases("found"))
def test_a_rule_finds_its_cases_whole_and_split_anywhere(rule: str, marked: str) -> None:
    match = MARKED.search(marked)
    assert match is not None
    text = marked.replace("[[", "", 1).replace("]]", "", 1)
    start, end = match.start(), match.start() + len(match[1])
    detector = Detector([alone(rule)])
    whole = set(detector.scan(text).spans)
    assert any((span.start, span.end) == (start, end) for span in whole), whole
    assert all(span.kind == RULES[rule].kind for span in whole)
    for split in range(1, len(text)):
        scanner = detector.scanner()
        first, second = set(scanner.feed(text[:split])), set(scanner.feed(text[split:]))
        assert whole <= first | second
        assert not {span for span in second - whole if span.source == "rule"}


@pytest.mark.parametrize(("rule", "text"), cases("clear"))
def test_a_rule_leaves_its_false_cases(rule: str, text: str) -> None:
    found = [span for view in views(text) for span in alone(rule).spans(view.text)]
    assert found == []


def full_width(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def zero_width(text: str) -> str:
    return "\u200b".join(text)


ALIKE = {plain: letter for letter, plain in LOOKALIKES.items()}


def look_alike(text: str) -> str:
    """Put one letter of another script into every word that is of letters and digits of ours."""

    def word(match: re.Match[str]) -> str:
        letters = [c for c in match[0] if c in ALIKE]
        ours = sum(c.isascii() and c.isalnum() for c in match[0])
        if not letters or ours < 2 or LOOKALIKES.keys() & set(match[0]):
            return match[0]
        return match[0].replace(letters[0], ALIKE[letters[0]], 1)

    return re.sub(r"\S+", word, text)


@pytest.mark.parametrize("disguise", [full_width, zero_width, look_alike])
def test_no_rule_is_escaped_by_other_characters(disguise: Callable[[str], str]) -> None:
    for rule, marked in cases("found"):
        text = marked.replace("[[", "", 1).replace("]]", "", 1)
        found = Detector([alone(rule)]).scan(disguise(text)).spans
        assert any(span.kind == RULES[rule].kind for span in found), (rule, text)


def test_no_rule_needs_more_text_than_a_window_carries() -> None:
    long: list[Rule] = [rule for rule in RULES.values() if rule.reach > 64]
    assert long == []
