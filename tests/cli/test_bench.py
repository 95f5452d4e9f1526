from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kvkeep.cli import run
from kvkeep.cli.bench import checkout, names


def test_an_unknown_benchmark_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "harness.py").touch()
    (tmp_path / "bench" / "toy.py").write_text(
        'def main(arguments):\n    return run("toy", arguments, measure)\n'
    )
    (tmp_path / "bench" / "script.py").write_text("def main(arguments):\n    return 0\n")
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


BENCHMARKS = names(checkout())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_after_a_name_is_the_benchmarks_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", name, "--help"]) == 0
    told = capsys.readouterr().out
    source = checkout() / "bench" / f"{name}.py"
    assert told.startswith(f"usage: kvkeep bench {name} ")
    assert (ast.get_docstring(ast.parse(source.read_text())) or name) in told
    assert all(flag in told for flag in ("--quick", "--json", "--peer", "--only", "--threads"))


def test_help_wins_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels_linear", "--help", "--quick"]) == 0
    assert "GB/s of weights" in capsys.readouterr().out


def test_help_without_a_name_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    told = capsys.readouterr().out
    assert "its own flags follow its name" in told
    assert told.strip().endswith(f"Benchmarks: {', '.join(BENCHMARKS)}")


def test_scripts_that_write_a_file_are_no_benchmarks() -> None:
    assert {"attention", "sharing", "storm"} <= set(BENCHMARKS)
    assert not {"quality_suite", "sharing_trace", "eviction_choose"} & set(BENCHMARKS)
