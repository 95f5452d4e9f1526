from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.figures import leak

ROW = {
    "engine": "kvkeep",
    "policy": "isolate",
    "ttft_median_ms": 300.0,
    "tokens_per_s": 5.0,
    "attack_auc": 0.51,
    "attack_auc_halfwidth": 0.03,
}


def test_rows_without_an_attack_are_no_points() -> None:
    rows = [ROW, ROW | {"attack_auc": None}, {"figure": "x", "median": 1.0}]
    assert leak.points(rows) == [leak.Point("kvkeep", "isolate", 300.0, 0.51, 0.03)]


def test_every_policy_is_named_in_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, out = tmp_path / "sharing.json", tmp_path / "figures" / "leak.svg"
    other = ROW | {"engine": "other", "policy": "share_all", "attack_auc": 1.0}
    results.write_text(json.dumps({"rows": [ROW, other]}))
    monkeypatch.setattr(leak, "OUT", out)
    assert leak.main([str(results)]) == 0
    drawn = out.read_text()
    assert "isolate" in drawn
    assert "share_all" in drawn


def test_without_points_the_figure_says_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sharing.json").write_text('{"rows": []}')
    assert leak.main([str(tmp_path / "sharing.json")]) == 1
    assert "kvkeep bench sharing" in capsys.readouterr().err
