"""The check of a GPU machine, with fakes in place of pip, pytest and the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tools.gpu import check, greedy, wheels


def fake_pip(folder: Path, size: int) -> wheels.Run:
    def run(command: Sequence[str]) -> None:
        assert command[-1] in wheels.NEEDED
        (folder / "one.whl").write_bytes(bytes(size))

    return run


def test_wheels_are_gathered_afresh(tmp_path: Path) -> None:
    (tmp_path / "old.whl").write_bytes(b"x")
    assert wheels.gather(wheels.NEEDED, tmp_path, fake_pip(tmp_path, 10)) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["one.whl"]


def test_more_than_64_mib_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "LIMIT_BYTES", 1 << 20)
    with pytest.raises(RuntimeError, match=r"take 1\.0 MiB, more than 1"):
        wheels.gather(wheels.NEEDED, tmp_path, fake_pip(tmp_path, (1 << 20) + 1))
    assert not tmp_path.exists()


def test_wheels_are_pinned_for_the_other_python() -> None:
    command = wheels.download(["msgspec"], Path("to"))
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "--only-binary=:all:" in command
    pins = (wheels.ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    for name in wheels.NEEDED:
        assert f"\n{name.lower().replace('_', '-')}==" in pins


def test_every_step_runs_and_one_failure_shows() -> None:
    plan = check.steps(Path("out"), quick=True)
    assert [step.name for step in plan] == ["wheels", "build", "tests", "greedy", "grid", "codes"]
    run: list[Sequence[str]] = []

    def fake(command: Sequence[str]) -> int:
        run.append(command)
        return int("tools.gpu.greedy" in command)

    found = check.check(plan, fake)
    assert [outcome.passed for outcome in found] == [True, True, True, False, True, True]
    assert run == [step.command for step in plan]
    assert "--quick" in run[-1]


def test_nothing_runs_where_the_build_failed() -> None:
    found = check.check(check.steps(Path("out"), quick=False), lambda _: 1)
    assert [(outcome.name, outcome.passed) for outcome in found] == [("wheels", False)]


def test_its_tests_are_there() -> None:
    assert all((wheels.ROOT / path).is_file() for path in check.TESTS)


def test_agreement_ends_at_the_first_difference() -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(97 + i) for i in ids)

    assert greedy.agreement("abc", [0, 1, 2], decode) == 3
    assert greedy.agreement("axc", [0, 1, 2], decode) == 1
    assert greedy.agreement("", [0], decode) == 0


def test_prompts_share_their_prefix_and_nothing_more() -> None:
    made = greedy.prompts(5000)
    assert len({tuple(prompt[: greedy.PREFIX]) for prompt in made}) == 1
    assert len({tuple(prompt) for prompt in made}) == greedy.REQUESTS
