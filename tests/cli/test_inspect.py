"""`kvkeep inspect page` on a small model: a picture, figures, clear refusals, never text."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvkeep.cli import run
from kvkeep.inspect.page import PageErrors
from kvkeep.models.make import tiny

WORD = "heliotrope"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(f"The {WORD} stands at the door of the north gate. " * 40)
    return path


def arguments(model: Path, text: Path, out: Path, *others: str) -> list[str]:
    told = ["--model", str(model), "--text", str(text), "--threads", "1", "-o", str(out)]
    return ["inspect", "page", *told, *others]


def test_a_page_is_drawn_and_told_without_its_text(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.svg"
    assert run(arguments(model, text, out, "--kv", "k2v2", "--page", "1", "--json")) == 0
    said = capsys.readouterr()
    errors = msgspec.json.decode(said.out, type=PageErrors)
    assert (errors.codec, errors.page, errors.model) == ("k2v2", 1, "tiny")
    assert errors.digest[:16] in out.read_text()
    strings = {value for value in msgspec.to_builtins(errors).values() if isinstance(value, str)}
    assert strings == {"k2v2", "tiny", errors.digest, errors.dtype}
    assert not any(WORD in told for told in (said.out, said.err, out.read_text()))


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["--kv", "bf16", "--page", "0"], "kv: bf16 names no codec"),
        (["--kv", "k2v2", "--page", "4000"], "page: the text has no page 4000"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    told: list[str],
    sentence: str,
) -> None:
    assert run(arguments(model, text, tmp_path / "page.svg", *told)) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "page.svg").exists()


def test_a_text_that_is_not_there_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = arguments(model, tmp_path / "none", tmp_path / "page.svg", "--kv", "k2v2", "--page", "0")
    assert run(told) == 1
    assert "text: can't read" in capsys.readouterr().err
