"""From a prompt to a dump to its tokens: `inspect dump`, then `attack-cache`."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from kvkeep.audit.stolen import Report
from kvkeep.cli import run
from kvkeep.models.make import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny", overrides={"head_dim": 64})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prompt.txt"
    path.write_text("The heliotrope stands at the door of the north gate, red and blue. " * 12)
    return path


def dumped(model: Path, text: Path, out: Path, *more: str) -> Path:
    told = ["--model", str(model), "--text", str(text), "--threads", "1", "-o", str(out), *more]
    assert run(["inspect", "dump", *told]) == 0
    return out


@pytest.mark.parametrize("shield", ["off", "perm"])
def test_a_dump_is_attacked(
    model: Path, text: Path, tmp_path: Path, shield: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = dumped(model, text, tmp_path / "d.npz", "--shield", shield)
    assert run(["attack-cache", str(dump), "--model", str(model), "--json"]) == 3
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert report.best.top1 is not None
    assert report.best.top1 >= 0.95
    assert run(["attack-cache", str(dump), "--model", str(model), "--known", "70"]) == 3
    assert "leak: " in capsys.readouterr().out


def test_random_bytes_say_nothing(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "frame.bin"
    file.write_bytes(os.urandom(1 << 20))
    assert run(["attack-cache", str(file), "--model", str(model)]) == 0
    assert "nothing found above chance" in capsys.readouterr().out
    small = tmp_path / "small.bin"
    small.write_bytes(os.urandom(200_000))
    told = ["attack-cache", str(small), "--model", str(model), "--text", str(text), "--rows"]
    assert run(told) == 0


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["--known", "5"], "known: say what was known"),
        (["--text", "nowhere.txt"], "text: can't read nowhere.txt"),
    ],
)
def test_what_can_not_be_counted_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: list[str], sentence: str
) -> None:
    file = tmp_path / "frame.bin"
    file.write_bytes(os.urandom(1 << 20))
    assert run(["attack-cache", str(file), "--model", str(model), *told]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["--kv", "auto", "-o", "d.npz"], "kv: auto chooses by request"),
        (["-o", "d.txt"], "out: a dump is an .npz file"),
    ],
)
def test_a_dump_needs_one_form_and_a_name(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], told: list[str], sentence: str
) -> None:
    assert run(["inspect", "dump", "--model", str(model), "--text", str(text), *told]) == 1
    assert sentence in capsys.readouterr().err
