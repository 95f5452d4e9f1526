from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import sharing_results
from tools.sharing_results import MixedResultsError, Policy

MACHINE = {"cpu": "some", "cores": 2}


def cost(policy: str, ttft_ms: float, engine: str = "kvkeep") -> dict[str, Any]:
    return {
        "engine": engine,
        "policy": policy,
        "ttft_median_ms": ttft_ms,
        "tokens_per_s": 5.0,
        "hit_ratio": 0.5,
        "attack_auc": None,
    }


def leak(policy: str, auc: float, beside: str = "") -> dict[str, Any]:
    name = f"attack_auc_private_{policy}{beside}"
    return {"figure": name, "median": auc, "low": auc - 0.02, "high": auc + 0.04}


def results(
    path: Path,
    *rows: dict[str, Any],
    commit: str = "a" * 40,
    date: str = "2026-01-01T00:00:00",
    machine: dict[str, Any] | None = None,
    quick: bool = False,
) -> Path:
    meta = {"commit": commit, "date": date, "machine": machine or MACHINE}
    meta["params"] = {"quick": quick}
    path.write_text(json.dumps({"name": "sharing", "meta": meta, "rows": rows}))
    return path


def test_a_replay_and_an_audit_of_two_files_are_one_policy_with_both_commits(
    tmp_path: Path,
) -> None:
    replay = results(tmp_path / "a.json", cost("selective", 60.0), cost("isolate", 120.0))
    audit = results(tmp_path / "b.json", leak("selective", 0.5), commit="b" * 40)
    isolate, selective = sharing_results.read([replay, audit])
    assert (isolate.name, selective.name) == ("isolate", "selective")
    assert isolate.leak is None
    assert selective.cost is not None
    assert selective.leak is not None
    assert selective.cost.ttft_ms == 60.0
    assert (selective.leak.auc, selective.leak.low) == (0.5, 0.48)
    assert selective.leak.halfwidth == pytest.approx(0.03)
    assert sharing_results.provenance([isolate, selective]) == [
        "replay: commit aaaaaaaa, 2026-01-01 (isolate, selective)",
        "audit: commit bbbbbbbb, 2026-01-01 (selective)",
        "machine: some, 2 cores",
    ]


def test_of_two_replays_the_later_counts_whatever_its_file_is_called(tmp_path: Path) -> None:
    late = results(tmp_path / "a.json", cost("dp", 2.0), date="2026-01-02T00:00:00")
    early = results(tmp_path / "b.json", cost("dp", 1.0), cost("salt", 1.0))
    found = {p.name: p.cost for p in sharing_results.read([late, early])}
    assert {name: one.ttft_ms for name, one in found.items() if one} == {"dp": 2.0, "salt": 1.0}


@pytest.mark.parametrize("beside", ["_halfwidth", "_holds_chance"])
def test_what_stands_beside_an_auc_is_no_auc(tmp_path: Path, beside: str) -> None:
    figures = [leak("vllm_salted", 0.5), leak("vllm_salted", 1.0, beside)]
    (found,) = sharing_results.read([results(tmp_path / "a.json", *figures)])
    assert found == Policy("vllm_salted", None, found.leak)
    assert found.leak is not None
    assert found.leak.auc == 0.5


def test_other_figures_and_rows_of_channels_say_nothing_of_a_policy(tmp_path: Path) -> None:
    channel = {"policy": "dp", "seed": 1, "channel": "ttft", "auc": 0.5}
    control = leak("x", 1.0) | {"figure": "attack_auc_sent_by_k_selective"}
    assert sharing_results.read([results(tmp_path / "a.json", channel, control)]) == []


def test_a_commit_with_changes_says_so(tmp_path: Path) -> None:
    file = results(tmp_path / "a.json", cost("dp", 1.0), commit="c" * 40 + "-dirty")
    first, *_ = sharing_results.provenance(sharing_results.read([file]))
    assert first == "replay: commit cccccccc and changes, 2026-01-01 (dp)"


def test_machines_are_not_mixed(tmp_path: Path) -> None:
    one = results(tmp_path / "a.json", cost("dp", 1.0))
    other = results(tmp_path / "b.json", leak("dp", 1.0), machine=MACHINE | {"cores": 8})
    with pytest.raises(
        MixedResultsError, match=r"a\.json \(some, 2 cores\).*give the files of one"
    ):
        sharing_results.read([one, other])


def test_a_quick_run_is_no_record(tmp_path: Path) -> None:
    file = results(tmp_path / "a.json", cost("dp", 1.0), quick=True)
    with pytest.raises(MixedResultsError, match=r"a\.json: a quick run"):
        sharing_results.read([file])
