from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from bench.detect import Judge
from bench.public_prompts import PARTS
from kvkeep.sharing.detector.context import ContextRules
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.spans import Span
from tools.detector_data import development, validation
from tools.validate_detector import rates, told


class Shouts:
    """Finds every capital X."""

    def spans(self, text: str) -> list[Span]:
        return [Span(i, i + 1, "x", "person", 0.9, "rule") for i, c in enumerate(text) if c == "X"]


def parts(path: Path) -> set[str]:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {text for texts in tables.values() for text in texts}


def test_prompts_are_in_one_place_alone() -> None:
    """What a detector is chosen by is neither what its bounds know nor what it is judged by."""
    chosen, known, judging = map(parts, (development.PROMPTS, validation.PROMPTS, PARTS))
    assert min(len(chosen), len(known)) > 30
    assert not chosen & judging
    assert not known & judging
    assert not chosen & known


def test_what_is_judged_wrongly_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    judge = Judge(Detector([Shouts()]), Detector([]), ContextRules())
    texts = [("has X", "name"), ("has none", "name"), ("an X too", ""), ("nothing", "")]
    scores = told(judge, texts, misses=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == ["  [name", "  [nothing"]
    assert "rules 0.5000 scorer 0.0000 all 0.5000 taint 0.5000" in rates("all", scores)
