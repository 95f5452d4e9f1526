"""How `kvkeep bench tiers` takes its parts, without its servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import harness, tiers, tiers_faults
from bench.harness import Options
from bench.kept import Kept
from bench.tiers_faults import Counted
from kvkeep.errors import ConfigError


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"only: .*'fault'.*faults"):
        tiers.measure(Options(only=("ttft", "fault")))


def test_a_run_that_was_cut_off_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def fault_run(seed: int) -> Counted:
        if seed == 2 and made.count(2) == 0:
            made.append(seed)
            raise KeyboardInterrupt
        made.append(seed)
        return Counted(100 + seed, seed, 1, 1, 1, 2)

    monkeypatch.setattr(tiers_faults, "fault_run", fault_run)
    monkeypatch.setattr(harness, "commit", lambda: "a" * 40)
    kept = Kept(Counted, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tiers_faults.fault_runs(3, kept)
    assert kept.names() == ["run-0", "run-1"]
    assert tiers_faults.fault_runs(3, kept) == Counted(303, 3, 3, 3, 3, 6)
    assert made == [0, 1, 2, 2]
    monkeypatch.setattr(harness, "commit", lambda: "a" * 40 + "-dirty")
    tiers_faults.fault_runs(1, kept)
    assert made[-1] == 0, "a changed tree is measured anew"
