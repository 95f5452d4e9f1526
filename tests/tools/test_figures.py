from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from tests.tools.test_sharing_results import cost, leak, results
from tools.figures import capacity, drawing, eviction, fanout, thief
from tools.figures import leak as leak_figure
from tools.figures.drawing import Figure

Draw = Callable[[Sequence[Path]], Figure | None]


def test_what_was_audited_has_an_interval_and_what_was_not_is_named_so(tmp_path: Path) -> None:
    replays = [cost("isolate", 300.0), cost("dp", 400.0), cost("vllm", 90.0, "vllm 1.2")]
    replay = results(tmp_path / "a.json", *replays)
    audits = [leak("isolate", 0.5), leak("vllm", 1.0), leak("pinned", 0.5)]
    audit = results(tmp_path / "b.json", *audits, commit="b" * 40)
    figure = leak_figure.draw([replay, audit])
    assert figure is not None
    above, below = figure.axes
    _, named = above.get_legend_handles_labels()
    assert named == ["chance ± 0.03", "isolate", "vllm 1.2, as it comes"]
    assert [text.get_text() for text in below.get_yticklabels()] == ["dp"]
    assert "no audit recorded" in below.get_title(loc="left")
    (caption,) = (text.get_text() for text in below.texts)
    assert "replay: commit aaaaaaaa" in caption
    assert "audit: commit bbbbbbbb" in caption
    assert "for want of a replay: pinned" in caption
    drawing.plt.close(figure)


def test_results_of_two_machines_make_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = results(tmp_path / "a.json", cost("dp", 1.0))
    other = results(tmp_path / "b.json", leak("dp", 1.0), machine={"cpu": "x", "cores": 8})
    assert leak_figure.main([str(one), str(other)]) == 1
    assert "several machines" in capsys.readouterr().err


def test_the_committed_leak_is_drawn_from_the_committed_results(tmp_path: Path) -> None:
    out = tmp_path / "leak.svg"
    assert drawing.run([], "sharing", out, leak_figure.draw) == 0
    assert described(out)
    assert described(leak_figure.OUT) == described(out), "run make figure-leak"


def described(path: Path) -> str:
    found = ET.parse(path).find(".//{http://purl.org/dc/elements/1.1/}description")
    return "" if found is None else str(found.text)


CASES = [
    {"case": name, "requests": count, "tokens": 8192, "pool_bytes": 4 << 30}
    for name, count in (("+ corm", 50), ("bf16", 4), ("+ k2v2", 20), ("k4v2 + corm", 40))
]


def asked(model: str, date: str, **summary: float) -> str:
    """Return what `kvkeep bench quality` writes of a model."""
    return json.dumps({"meta": {"params": {"model": model}, "date": date}, "summary": summary})


def test_bars_of_capacity_say_what_was_measured_of_their_answers(tmp_path: Path) -> None:
    found = capacity.bars(CASES, {"quality_loss_k2v2": 0.053, "combined_quality_loss_k4v2": 0.01})
    assert found == [
        capacity.Bar("bf16", 4, "whole cache,\n16 bits"),
        capacity.Bar("+ k2v2", 20, "5.3 % of\nanswers lost"),
        capacity.Bar("+ corm", 50, "answers not\nmeasured"),
        capacity.Bar("k4v2 + corm", 40, "1.0 % of\nanswers lost"),
    ]
    (tmp_path / "capacity.json").write_text(json.dumps({"rows": CASES, "summary": {}}))
    out = tmp_path / "capacity.svg"
    assert drawing.run([str(tmp_path / "capacity.json")], "capacity", out, capacity.draw) == 0
    assert "answers" in out.read_text()


def test_bars_of_capacity_go_by_the_demo_models_newest_answers(tmp_path: Path) -> None:
    """The order of names says nothing, and other models' answers are not these."""
    newer = asked(capacity.DEMO, "2026-11-22T10:00:00", quality_loss_k2v2=0.02)
    older = asked(capacity.DEMO, "2026-11-21T10:00:00", quality_loss_k2v2=0.5, other=0.1)
    (tmp_path / "quality-a.json").write_text(newer)
    (tmp_path / "quality-b.json").write_text(older)
    large = asked("qwen", "2026-11-23T10:00:00", quality_loss_k2v2=0.9)
    (tmp_path / "quality-c.json").write_text(large)
    assert capacity.measured(tmp_path) == {"quality_loss_k2v2": 0.02, "other": 0.1}


def test_every_head_has_its_share_in_the_figure(tmp_path: Path) -> None:
    path, out = tmp_path / "eviction.json", tmp_path / "eviction.svg"
    shares = {(0, 0): 0.11, (0, 1): 0.83, (1, 0): 0.37, (1, 1): 1.0}
    rows = [
        {"question": "after", "model": "demo", "layer": at, "head": head, "kept_by_head": kept}
        for (at, head), kept in shares.items()
    ]
    path.write_text(json.dumps({"rows": [{"figure": "x"}, *rows]}))
    assert drawing.run([str(path)], "eviction", out, eviction.draw) == 0
    figure = eviction.draw([path])
    assert figure is not None
    said = {text.get_text() for text in figure.axes[0].texts}
    assert said == {"11%", "83%", "37%", "100%"}
    drawing.plt.close(figure)


@pytest.mark.parametrize(
    ("bench", "draw"),
    [
        ("sharing", leak_figure.draw),
        ("fanout", fanout.draw),
        ("capacity", capacity.draw),
        ("eviction", eviction.draw),
    ],
)
def test_without_rows_a_figure_says_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bench: str, draw: Draw
) -> None:
    empty, out = results(tmp_path / "results.json"), tmp_path / "figure.svg"
    assert drawing.run([str(empty)], bench, out, draw) == 1
    assert f"kvkeep bench {bench}" in capsys.readouterr().err
    assert not out.exists()


def test_the_committed_results_draw_the_fanout(tmp_path: Path) -> None:
    out = tmp_path / "fanout.svg"
    assert drawing.run([], "fanout", out, fanout.draw) == 0
    assert "request by request" in out.read_text()


def thief_rows() -> list[dict[str, object]]:
    own = [("off", 1.0), ("orth", 0.98), ("seal", 0.0004)]
    toy = {"model": "toy", "kv": "bf16", "known": 0}
    known = {"stolen": "orth", **toy, "known": 256, "top1": 1.0}
    return [*({"stolen": mode, **toy, "top1": top1} for mode, top1 in own), known]


def test_what_a_thief_learns_is_drawn_per_mode(tmp_path: Path) -> None:
    path = tmp_path / "shield.json"
    more = {"figure": "shred_s", "median": 12.0}
    path.write_text(json.dumps({"rows": [*thief_rows(), more]}))
    figure = thief.draw([path])
    assert figure is not None
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["as computed", "orth", "sealed"]
    heights = [bar.get_extents().height for bar in axes.patches]
    assert [h / heights[0] for h in heights] == pytest.approx([1.0, 0.98, 0.0004])
    (mark,) = axes.lines
    assert np.array_equal(mark.get_xydata(), [[1.0, 1.0]])
    assert figure.get_label() == "a tenant's pages are dead 12 s after shred"
    drawing.plt.close(figure)


def test_without_attacks_there_is_no_thief(tmp_path: Path) -> None:
    path = tmp_path / "shield.json"
    path.write_text(json.dumps({"rows": [{"figure": "seal_ratio", "median": 0.9}]}))
    assert thief.draw([path]) is None
