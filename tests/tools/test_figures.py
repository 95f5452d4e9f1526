from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.figures import drawing, fanout, leak
from tools.figures.drawing import Figure, Rows

Draw = Callable[[Rows], Figure | None]

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


def test_every_policy_is_named_in_the_figure(tmp_path: Path) -> None:
    results, out = tmp_path / "sharing.json", tmp_path / "figures" / "leak.svg"
    other = ROW | {"engine": "other", "policy": "share_all", "attack_auc": 1.0}
    results.write_text(json.dumps({"rows": [ROW, other]}))
    assert drawing.run([str(results)], "sharing", out, leak.draw) == 0
    drawn = out.read_text()
    assert "isolate" in drawn
    assert "share_all" in drawn


@pytest.mark.parametrize(("bench", "draw"), [("sharing", leak.draw), ("fanout", fanout.draw)])
def test_without_rows_a_figure_says_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bench: str, draw: Draw
) -> None:
    results, out = tmp_path / "results.json", tmp_path / "figure.svg"
    results.write_text('{"rows": []}')
    assert drawing.run([str(results)], bench, out, draw) == 1
    assert f"kvkeep bench {bench}" in capsys.readouterr().err
    assert not out.exists()


def test_the_committed_results_draw_the_fanout(tmp_path: Path) -> None:
    out = tmp_path / "fanout.svg"
    assert drawing.run([], "fanout", out, fanout.draw) == 0
    assert "request by request" in out.read_text()
