from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer

from bench import detect_text
from bench.detect import (
    Score,
    by_kind,
    equal_false_positives,
    flagged,
    macro,
    share,
    tainted,
)
from bench.public_prompts import DEMO_TOKENIZER, PROMPT_TOKENS, public_prompts
from tools.detector_data.passages import LIMIT

PAGE = r""".TH X 1
.SH NAME
thing \- does \fBsomething\fR
.SH BESCHREIBUNG
.PP
Text mit
.B Fettdruck
und mehr.
.SH AUTOR
Jemand Bestimmtes
.SH "SIEHE AUCH"
.BR other (1)
"""


def score(kind: str, rules: float, scorer: float) -> Score:
    return Score(kind, {"rules": rules, "scorer": scorer, "all": max(rules, scorer)})


def test_recall_is_the_mean_over_kinds_not_over_passages() -> None:
    found = macro({"a": [True] * 90 + [False] * 10, "b": [True, False]})
    assert abs(found.median - 0.7) < 1e-9
    assert found.low < 0.7 < found.high
    assert found.samples == 102


def test_grey_is_flagged_and_not_tainted() -> None:
    assert [flagged(s) for s in (0.0, 0.29, 0.3, 0.7, 0.71)] == [False, False, True, True, True]
    assert [tainted(s) for s in (0.3, 0.7, 0.71)] == [False, False, True]


def test_shares_are_counted_by_way_and_kind() -> None:
    scores = [score("a", 0.9, 0.0), score("a", 0.0, 0.9), score("b", 0.0, 0.0)]
    assert by_kind(scores, "rules", frozenset({"a"}), flagged) == {"a": [True, False]}
    assert share(scores, "all", flagged).median == 2 / 3


def test_the_scorer_is_compared_at_no_more_false_positives_than_rules() -> None:
    negative = [score("", 0.9, 0.95)] + [score("", 0.0, 0.1 * at) for at in range(9)]
    positive = [score("person_name", 0.0, 0.85), score("person_name", 0.9, 0.75)]
    row = equal_false_positives(positive, negative)
    assert row["false_positives"] == 0.1
    assert row["free_text_recall_rules"] == 0.5
    assert row["free_text_recall_scorer"] == 0.5


def test_manual_pages_lose_markup_and_people() -> None:
    text = detect_text.page_text(PAGE)
    assert "thing - does something" in text
    assert "Text mit\nFettdruck\nund mehr." in text
    assert "Jemand" not in text
    assert "other (1)" in text


def test_passages_are_short_and_lose_nothing_but_the_last_crumb() -> None:
    rng = random.Random(2)
    text = "\n".join("x" * rng.randint(1, 700) for _ in range(60))
    pieces = list(detect_text.passages(text))
    assert all(0 < len(piece) <= LIMIT for piece in pieces)


def test_docstrings_come_from_the_library_and_name_no_one() -> None:
    found = detect_text.docstring_passages(40, 1)
    assert len(found) == 40
    assert found == detect_text.docstring_passages(40, 1)
    assert not any("@" in text for text in found)


def test_a_language_without_pages_has_none(tmp_path: Path) -> None:
    assert detect_text.manual_passages("de", 3, 1, folders=(tmp_path,)) == []


def test_public_prompts_have_their_length() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_TOKENIZER))
    for text in public_prompts(3):
        count = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert abs(count - PROMPT_TOKENS) <= 8
