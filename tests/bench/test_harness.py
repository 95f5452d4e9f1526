from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from bench.harness import (
    MIN_PAIRS,
    Estimate,
    Figure,
    Goal,
    Options,
    Pair,
    Report,
    deliver,
    estimate,
    interleave,
    parse,
    ratio,
    run,
)


def exactly(low: float, high: float, samples: int = MIN_PAIRS) -> Estimate:
    return Estimate((low + high) / 2, low, high, samples)


@pytest.mark.parametrize(
    ("goal", "low", "high", "status"),
    [
        (Goal(">=", 3.0), 3.0, 3.4, "shown"),
        (Goal(">=", 3.0), 2.9, 3.4, "not shown"),
        (Goal(">=", 3.0), 2.5, 2.9, "missed"),
        (Goal(">=", 3.0), 2.5, 3.0, "not shown"),
        (Goal("<=", 2.0), 1.5, 2.0, "shown"),
        (Goal("<=", 2.0), 1.5, 2.1, "not shown"),
        (Goal("<=", 2.0), 2.1, 2.2, "missed"),
    ],
)
def test_a_goal_inside_the_interval_is_not_shown(
    goal: Goal, low: float, high: float, status: str
) -> None:
    assert goal.status(exactly(low, high)) == status


def test_few_samples_show_nothing() -> None:
    assert Goal(">=", 1.0).status(exactly(5, 6, samples=MIN_PAIRS - 1)) == "not shown"


def test_the_first_of_a_pair_alternates() -> None:
    order: list[str] = []

    def take(name: str, value: float) -> float:
        order.append(name)
        return value

    pairs = interleave(lambda: take("a", 1.0), lambda: take("b", 2.0), 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert pairs == [Pair(1.0, 2.0)] * 3


def test_the_ratio_is_taken_pair_by_pair() -> None:
    drifting = [Pair(2.0 * speed, speed) for speed in (1.0, 5.0, 9.0, 2.0)]
    assert ratio(drifting) == Estimate(2.0, 2.0, 2.0, 4)


def test_the_interval_holds_the_median_and_is_reproducible() -> None:
    samples = [1.0, 1.1, 0.9, 1.3, 1.0, 5.0, 1.2, 1.05, 0.95, 1.0]
    found = estimate(samples)
    assert found == estimate(samples)
    assert found.low <= found.median <= found.high
    assert found.high < 5.0


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_an_estimate_of_nothing_is_an_error(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        estimate(samples)


def a_report() -> Report:
    figure = Figure("speed", exactly(2.0, 2.2), Goal(">=", 2.0))
    return Report("toy", {"rows": 8}, [figure], [{"pair": 0, "tokens_per_s": 10.5}])


def test_the_document_has_the_agreed_shape(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    assert run("toy", ["--json", str(path)], lambda _: a_report()) == 0
    document = json.loads(path.read_text())
    assert list(document) == ["name", "meta", "rows", "summary"]
    assert set(document["meta"]) == {"commit", "machine", "date", "params", "versions"}
    assert document["meta"]["machine"]["isa"] in {"avx512", "avx2", "portable"}
    assert document["summary"] == {"speed": pytest.approx(2.1)}
    assert document["rows"][0] == {"pair": 0, "tokens_per_s": 10.5}
    assert document["rows"][1]["status"] == "shown"


def test_stdout_holds_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    deliver(a_report(), Options(json="-"))
    assert json.loads(capsys.readouterr().out)["name"] == "toy"


def test_flags() -> None:
    assert parse("toy", ["--quick", "--peer", "a", "--peer", "b"]) == Options(
        quick=True, peers=("a", "b")
    )


def test_a_benchmark_that_is_told_to_end_ends_what_it_started() -> None:
    ended: list[str] = []
    before = signal.getsignal(signal.SIGTERM)

    def measured(_: Options) -> Report:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append("server")
        return a_report()

    with pytest.raises(SystemExit) as ending:
        run("toy", [], measured)
    assert ending.value.code == 143
    assert ended == ["server"]
    assert signal.getsignal(signal.SIGTERM) is before
