from __future__ import annotations

import pytest

from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.loosen import shape
from kvkeep.sharing.detector.needs import CYRILLIC, DIGIT, WIDE, needs, offers
from kvkeep.sharing.detector.patterns import Pattern
from tests.sharing.detector.corpus import texts


@pytest.mark.parametrize(
    ("pattern", "needed"),
    [
        ("", set()),
        ("abc", set()),
        ("a[0-9]+", {DIGIT}),
        (r"\d|7", {DIGIT}),
        ("[0-9a]", set()),
        ("[^a]", set()),
        ("[0-9]?a", set()),
        ("[0-9]*a", set()),
        ("[0-9]{0,3}?a", set()),
        ("[0-9]{1,3}?a", {DIGIT}),
        ("(?:1|2){2}", {DIGIT}),
        ("(?:1|a)", set()),
        ("(?:1|号)(2)", {DIGIT}),
        ("(?P<n>号)1?", {WIDE}),
        ("(?i)(?:це|є)[а-я]", {CYRILLIC}),
        (r"[\p{Han}々]", {WIDE}),
        (r"[\p{Han}a]", set()),
        (r"\p{Cyrillic}\pN", {CYRILLIC}),
        (r"\x31\n\.", set()),
        (r"\Q[0-9]\E", {DIGIT}),
        (r"\Q1*", {DIGIT}),
        ("[[:digit:]]", set()),
        ("[[:digit:]1]", set()),
        ("(?:a|1)|2", set()),
        ("(?:1|1a)|2(?:号)?", {DIGIT}),
        ("(?:1号)?", set()),
    ],
)
def test_a_need_is_in_every_match(pattern: str, needed: set[str]) -> None:
    Pattern(pattern)
    assert needs(pattern) == needed


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("", set()),
        ("abc é –", {WIDE}),
        ("abc é", set()),
        ("9", {DIGIT}),
        ("є1", {DIGIT, CYRILLIC}),
        ("\u1c80", {CYRILLIC}),
        ("号", {WIDE}),
        ("ｶ𠀀", {WIDE}),
    ],
)
def test_a_text_offers_all_that_it_holds(text: str, offered: set[str]) -> None:
    assert offers(shape(text.encode())) == offered


def test_other_cases_of_a_script_are_offered() -> None:
    assert Pattern("(?i)в").search("\u1c80".encode()) is not None
    assert needs("(?i)в") <= offers("\u1c80".encode())


def test_whatever_a_rule_matches_offers_what_the_rule_needs() -> None:
    rules = [(needs(rule.pattern), Pattern(rule.pattern)) for rule in shipped_rules()]
    met = 0
    for text in texts(200, seed=3):
        data = text.encode()
        offered = offers(shape(data))
        for needed, pattern in rules:
            if not needed <= offered:
                met += 1
                assert pattern.search(data) is None
    assert met > 2000
