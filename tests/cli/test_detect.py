from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvkeep.cli import run
from tests.classifiers import save_classifier

SECRET = "Dear [team],\nwrite to anna.berg@firma.de\n"


@pytest.fixture
def letter(tmp_path: Path) -> str:
    path = tmp_path / "letter.txt"
    path.write_text(SECRET)
    return str(path)


def test_a_text_that_is_not_clear_ends_with_3(
    letter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["detect", letter]) == 3
    shown = capsys.readouterr()
    assert "anna.berg@firma.de" in shown.out
    assert "2:10" in shown.out
    assert "taint: " in shown.err


def test_a_clear_text_ends_with_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"plain words")))
    assert run(["detect", "-"]) == 0
    assert "clear: 0 spans in 11 characters" in capsys.readouterr().err


def test_lines_hold_no_text_and_reasons_only_when_asked(
    letter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["detect", letter, "--jsonl"]) == 3
    shown = capsys.readouterr().out
    assert "anna" not in shown
    row = next(row for row in map(json.loads, shown.splitlines()) if row["kind"] == "email")
    assert (row["kind"], row["start"], row["verdict"]) == ("email", 22, "taint")
    assert "reason" not in row
    assert run(["detect", letter, "--jsonl", "--explain"]) == 3
    assert '"reason": "rule email' in capsys.readouterr().out


def test_a_long_secret_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.txt"
    path.write_text("eyJhbGciOiJIUzI1NiJ9" + "x" * 80 + ".eyJzdWIiOiIx" + "y" * 20)
    assert run(["detect", str(path), "--explain"]) == 3
    assert "…" in capsys.readouterr().out


def test_an_organisation_s_rules_count(
    letter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "org.toml"
    rules.write_text('[[allow]]\nwords = ["anna.berg@firma.de"]\n')
    assert run(["detect", letter, "--rules", str(rules)]) == 0
    rules.write_text("[[allow]]\nword = []\n")
    assert run(["detect", letter, "--rules", str(rules)]) == 1
    assert "org.toml:2: no key 'word'; did you mean 'words'?" in capsys.readouterr().err


def test_a_classifier_reads_beside_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("i live here")
    assert run(["detect", str(text)]) == 0
    model = save_classifier(tmp_path / "model")
    assert run(["detect", str(text), "--classifier", str(model)]) == 3
    assert "person_name" in capsys.readouterr().out
    assert run(["detect", str(text), "--classifier", str(tmp_path / "none")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


def test_figures_on_labelled_passages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cases.jsonl"
    label = {"start": 5, "end": 23, "kind": "email"}
    rows = [{"text": "mail anna.berg@firma.de", "spans": [label]}, {"text": "clean words"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run(["detect", "--eval", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "recall, mean over kinds: 1.000" in shown
    assert "false positives: 0.000 (0 of 1 clean passages)" in shown
    assert run(["detect", "--eval", str(path), "--jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == {"email": 1.0}


def test_a_file_of_one_sort_gives_one_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"text": "clean words"}')
    assert run(["detect", "--eval", str(path)]) == 0
    assert "recall, mean" not in capsys.readouterr().out
    path.write_text('{"text": "ab", "spans": [{"start": 0, "end": 2, "kind": "x"}]}')
    assert run(["detect", "--eval", str(path)]) == 0
    assert "false positives" not in capsys.readouterr().out


def test_one_source_of_text_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["detect"]) == 1
    assert "FILE: name a file" in capsys.readouterr().err
    assert run(["detect", "/no/such/file"]) == 1
    assert "cannot be read" in capsys.readouterr().err
