from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep import cli
from kvkeep.cli import COMMANDS, run

HEAVY = ("torch", "transformers", "typer", "rich", "pydantic", "numpy")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvkeep.cli import run; run(['--help']);"
        f"sys.exit(', '.join(set(sys.modules) & set({HEAVY!r})) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert f"kvkeep {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_an_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serv"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'serv'" in error


def test_an_unknown_flag_ends_with_two() -> None:
    assert run(["tenant", "list", "--nope"]) == 2


def test_a_bad_setting_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kvkeep.toml").write_text("kernell = 'auto'\n")
    assert run(["tenant", "list"]) == 1
    assert capsys.readouterr().err == (
        "kvkeep: kvkeep.toml has an unknown key 'kernell'; the nearest one is 'kernel'\n"
    )


def test_fail_returns_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.fail("why", 3) == 3
    assert capsys.readouterr().err == "kvkeep: why\n"
