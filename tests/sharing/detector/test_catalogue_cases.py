"""Every rule against its table: what it finds, what it leaves, whole and split anywhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from kvkeep.sharing.detector.catalogue import Rule, shipped_rules
from kvkeep.sharing.detector.normalise import LOOKALIKES, views
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import Detector

CASES = Path(__file__).parent / "cases"
MARKED = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
ALIKE = {latin: other for other, latin in reversed(LOOKALIKES.items())}
JOINED_WRONGLY = {"employer-told-uk", "ua-passport"}
"""Their words of one letter, or signs, join with the letters beside them."""
SHORTEST_SPACED = 7
"""Letters apart that are joined; fewer stand apart in ordinary text."""
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


def untold(rules: Iterable[str], table: Mapping[str, Mapping[str, Sequence[str]]]) -> set[str]:
    """Return the rules without a table of what they find and leave, and tables without a rule."""
    told = {rule for rule, case in table.items() if case.get("found") and case.get("clear")}
    return told ^ {*rules}


def test_every_rule_has_true_and_false_cases() -> None:
    assert untold(RULES, TABLE) == set()


def test_a_rule_without_its_table_is_noticed() -> None:
    assert untold([*RULES, "planted"], TABLE) == {"planted"}
    first, *others = TABLE
    assert untold(RULES, {rule: TABLE[rule] for rule in others}) == {first}
    assert untold(RULES, {**TABLE, first: {"found": ["x"], "clear": []}}) == {first}


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


def look_alike(text: str) -> str:
    """Put a look-alike in place of the first such letter of each word that has more letters."""
    return "".join(map(_one_alike, re.split(r"(\s+)", text)))


def _one_alike(word: str) -> str:
    at = next((at for at, letter in enumerate(word) if letter in ALIKE), None)
    others = sum(letter.isascii() and letter.isalnum() for letter in word)
    if at is None or others < 2 or not word.isascii():
        return word
    return word[:at] + ALIKE[word[at]] + word[at + 1 :]


@pytest.mark.parametrize("disguise", [full_width, zero_width, look_alike])
def test_no_rule_is_escaped_by_other_characters(disguise: Callable[[str], str]) -> None:
    for rule, marked in cases("found"):
        text = marked.replace("[[", "", 1).replace("]]", "", 1)
        found = Detector([alone(rule)]).scan(disguise(text)).spans
        assert any(span.kind == RULES[rule].kind for span in found), (rule, text)


def spaced(marked: str) -> str:
    """Return a case with a space after every letter of its value, words three apart.

    Empty where the value is short, or part of a longer token.
    """
    match = MARKED.search(marked)
    assert match is not None
    before, value, after = marked[: match.start()], match[1], marked[match.end() :]
    inside = before[-1:].strip() or after[:1].strip(" \n,.;:!?)\"'")
    if inside or len(value.replace(" ", "")) < SHORTEST_SPACED:
        return ""
    return f"{before}{' '.join(value)}{after}"


def test_no_rule_is_escaped_by_letters_apart() -> None:
    tried = [(rule, text) for rule, marked in cases("found") if (text := spaced(marked))]
    assert len(tried) > 300
    missed = {
        rule
        for rule, text in tried
        if not any(s.kind == RULES[rule].kind for s in Detector([alone(rule)]).scan(text).spans)
    }
    assert missed == JOINED_WRONGLY


def test_no_rule_needs_more_text_than_a_window_carries() -> None:
    long: list[Rule] = [rule for rule in RULES.values() if rule.reach > 64]
    assert long == []
