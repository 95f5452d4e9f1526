from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.cli import run


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--keys", str(tmp_path / "keys.json")]


def test_a_key_is_shown_once_on_stdout(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tenant", "add", "acme", "--share", "0.5", *keys]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("kvk_")
    assert key not in Path(keys[1]).read_text()
    assert run(["tenant", "list", *keys]) == 0
    listed = capsys.readouterr().out
    assert "acme" in listed
    assert key.split("_")[1] in listed
    assert key not in listed


def test_rotate_leaves_two_live_keys_and_revoke_none(
    keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tenant", "add", "acme", "--share", "0.5", *keys]) == 0
    first = capsys.readouterr().out.split("_")[1]
    assert run(["tenant", "rotate", "acme", *keys]) == 0
    second = capsys.readouterr().out.split("_")[1]
    assert run(["tenant", "list", *keys]) == 0
    assert f"{first}, {second}" in capsys.readouterr().out
    assert run(["tenant", "revoke", "acme", "--key", first, *keys]) == 0
    assert run(["tenant", "list", *keys]) == 0
    assert first not in capsys.readouterr().out
    assert run(["tenant", "revoke", "acme", *keys]) == 0
    assert run(["tenant", "list", *keys]) == 0
    assert "acme" not in capsys.readouterr().out


def test_gateway_children(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    gateway = ["tenant", "add", "gate", "--share", "1", "--gateway"]
    assert run([*gateway, "--child", "a=0.5", "--child", "b=0.5", *keys]) == 0
    assert run(["tenant", "add", "late", "--share", "0.1", *keys]) == 1
    assert "share: " in capsys.readouterr().err


@pytest.mark.parametrize("child", ["a", "a=", "a=much"])
def test_a_malformed_child_is_one_sentence(
    keys: list[str], child: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tenant", "add", "g", "--share", "1", "--gateway", "--child", child, *keys]) == 1
    assert capsys.readouterr().err.startswith("kvkeep: child: ")


def test_revoking_nobody_is_one_sentence(
    keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tenant", "revoke", "ghost", *keys]) == 1
    assert "ghost" in capsys.readouterr().err
