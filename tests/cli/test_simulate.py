from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from kvkeep.cli import run
from tests.sim.made import COSTS


@pytest.fixture
def costs(tmp_path: Path) -> str:
    path = tmp_path / "costs.json"
    path.write_bytes(msgspec.json.encode(COSTS))
    return str(path)


def test_a_plan_says_that_it_is_simulated(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "--costs", costs, "--requests", "50"]) == 0
    shown = capsys.readouterr()
    assert "simulated, not measured: 50 requests, 1 a second" in shown.out
    assert shown.out.count("streamed") == shown.out.count("at the end") > 0
    assert "made up" in shown.err


def test_a_plan_as_json(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--costs", costs, "--requests", "50", "--codec", "k2v2", "--decode", "0", "--json"]
    assert run(["simulate", *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["simulated"] is True
    (row,) = plan["rows"]
    assert (row["codec"], row["transfer"], row["busiest_link"]) == ("k2v2", "none", 0.0)
    assert sum(row["phases"].values()) == pytest.approx(1.0)


def test_where_to_split_is_compared(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--least-tokens", "0", "--least-tokens", "4000", "--requests", "50"]
    assert run(["simulate", "--costs", costs, "--codec", "k2v2", *told, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["least_tokens"] for row in rows] == [0, 0, 4000, 4000]
    every, long = rows[0], rows[2]
    assert long["busiest_link"] < every["busiest_link"]
    assert run(["simulate", "--costs", costs, "--requests", "50"]) == 0
    assert " 512 " in capsys.readouterr().out, "what a cluster splits by itself"


def test_a_codec_without_costs_ends_with_the_ones_there_are(
    costs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "--costs", costs, "--codec", "fp8"]) == 1
    assert "codec: 'fp8' was not measured" in capsys.readouterr().err
