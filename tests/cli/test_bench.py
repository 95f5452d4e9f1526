from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.cli import run


def test_an_unknown_benchmark_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "harness.py").touch()
    (tmp_path / "bench" / "toy.py").write_text("x = 1\n\ndef main(arguments):\n    return 0\n")
    assert run(["bench", "nope"]) == 1
    assert capsys.readouterr().err.strip().endswith("'nope'; there are: toy")


def test_flags_after_the_name_reach_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen: list[list[str]] = []

        def main(arguments: list[str]) -> int:
            seen.append(arguments)
            return 7

        patch.setattr("kvkeep.cli.bench.names", lambda _: ["harness"])
        patch.setattr("bench.harness.main", main, raising=False)
        assert run(["bench", "harness", "--quick", "--json", "-"]) == 7
    assert seen == [["--quick", "--json", "-"]]
