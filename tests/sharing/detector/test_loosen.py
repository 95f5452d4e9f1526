from __future__ import annotations

import random

import pytest

from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.loosen import loosened, shape
from kvkeep.sharing.detector.patterns import Pattern


@pytest.mark.parametrize(
    ("pattern", "loose"),
    [
        ("abc", "abc"),
        ("[0-9]{9}", "[01]{9}"),
        (r"\d[1-9]70", "[01]110"),
        ("[A-F2-7]{16}", "[1A-F]{3,}"),
        ("[a-z]{0,24}?x", "[a-z]*?x"),
        ("[a-z]{2}", "[a-z]{2,}"),
        ("(?:[ -]?[0-9]){12,18}", "(?:[ -]?[01]){12,18}"),
        ("(?:ab){2,7}", "(?:ab){2,}"),
        (r"\x27[\x27\p{Han}\x{80}-\x{99}1]", r"\x27[1\x27\p{Han}\x{80}-\x{99}]"),
        ("[^0-9a]", "[^01a]"),
        ("[^0a]", "[^0a]"),
        ("[^1-9]", "[^1]"),
        ("[0]", "0"),
        ("[2-57]", "1"),
        (r"[\d-]", "[01-]"),
        ("[^1a]", "[^a]"),
        ("[^1]", "(?s:.)"),
        (r"\b(?i:x)\pL\.", r"\b(?i:x)\pL\."),
        ("[]a1]", "[1]a]"),
        ("[[:alpha:]3]", "[1[:alpha:]]"),
        ("[^[:alpha:]3]", "[^[:alpha:]]"),
        (r"\Qa.[1]\E{2}1*", r"a\.\[1\]{2}1*"),
        (r"\Qa.b", r"a\.b"),
        (r"\\Qa.b", r"\\Qa.b"),
    ],
)
def test_digits_become_two_and_counts_go(pattern: str, loose: str) -> None:
    assert loosened(pattern) == loose


def test_a_shape_has_two_digits() -> None:
    assert shape("a19ї0".encode()) == "a11ї0".encode()


def test_what_a_rule_matches_its_loosened_pattern_matches() -> None:
    rng = random.Random(5)
    letters = "0123456789 -ABCdef@.:=/号路王様№їКМ"
    words = [
        "passport ",
        "Kontonummer: ",
        "AKIA",
        "Mr. ",
        "via ",
        "+49",
        "東京都",
        "患者：",
        "вул. ",
    ]
    pairs = [(Pattern(r.pattern), Pattern(loosened(r.pattern))) for r in shipped_rules()]
    matched = 0
    for _ in range(150):
        text = "".join(
            rng.choice(words) if rng.random() < 0.1 else rng.choice(letters) for _ in range(80)
        ).encode()
        for exact, loose in pairs:
            if exact.search(text) is not None:
                matched += 1
                assert loose.search(shape(text)) is not None
    assert matched > 50
