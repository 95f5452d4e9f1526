from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.detector.evaluate import Case, Label, evaluate, read_cases

DETECTOR = load_detector(rules_only=True)


def test_recall_is_the_mean_over_kinds_and_false_positives_are_passages() -> None:
    cases = [
        Case("mail anna.berg@firma.de", (Label(5, 23, "email"),)),
        Case("mail anna at firma", (Label(5, 18, "email"),)),
        Case("call +49 30 901820", (Label(5, 18, "phone"),)),
        Case("nothing here", ()),
        Case("order from anna.berg@firma.de", ()),
    ]
    result = evaluate(DETECTOR, cases)
    assert [(k.kind, k.found, k.passages) for k in result.kinds] == [
        ("email", 1, 2),
        ("phone", 1, 1),
    ]
    assert result.recall == 0.75
    assert result.false_positive_rate == 0.5


def test_a_span_elsewhere_does_not_count_as_found() -> None:
    result = evaluate(DETECTOR, [Case("x anna.berg@firma.de 1234", (Label(21, 25, "pin"),))])
    assert result.recall == 0
    assert result.false_positive_rate is None
    assert evaluate(DETECTOR, []).recall is None


def test_cases_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(
        '{"text": "ab", "spans": [{"start": 0, "end": 1, "kind": "x"}]}\n\n{"text": "c"}\n'
    )
    assert list(read_cases(path)) == [Case("ab", (Label(0, 1, "x"),)), Case("c", ())]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": 1, "spans": [1]}', '{"spans": []}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"cases\.jsonl:2: give an object"):
        list(read_cases(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_cases(tmp_path / "none"))
