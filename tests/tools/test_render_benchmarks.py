"""The benchmark page and the README say what the result files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.test_sharing_results import MACHINE
from tools import render_benchmarks, sharing_results
from tools.sharing_results import Cost, Leak, Policy, Source

SOURCE = Source("2026-01-01", "a" * 40, str(MACHINE))


def test_the_pages_are_current() -> None:
    assert render_benchmarks.main(["--check"]) == 0, "run python -m tools.render_benchmarks"


@pytest.mark.parametrize(
    ("path", "shown", "other"),
    [
        (render_benchmarks.PAGE, "| shown |", "| missed |"),
        (render_benchmarks.README, "| `selective`, the default |", "| `selective` |"),
    ],
)
def test_a_changed_figure_shows(path: Path, shown: str, other: str) -> None:
    page = path.read_text(encoding="utf-8")
    assert render_benchmarks.BLOCK.search(page), "the page shows at least one result file"
    typed = page.replace(shown, other, 1)
    assert typed != page
    assert render_benchmarks.render(typed) == page


def test_what_was_not_measured_says_so() -> None:
    cost = Cost("kvkeep", 63.5, 35933.4, 0.879, SOURCE)
    told = render_benchmarks.policy_cells(Policy("selective", cost, Leak(0.5, 0.48, 0.54, SOURCE)))
    assert [*told.values()][1:5] == ["64 ms", "35,933", "88%", "0.50 ± 0.03"]
    unaudited = render_benchmarks.policy_cells(Policy("selective", cost, None))
    assert unaudited["attack's AUC"] == "not measured"
    assert unaudited["first token, median"] == "64 ms"
    unplayed = render_benchmarks.policy_cells(Policy("dp", None, None))
    assert [*unplayed.values()][1:5] == ["not measured"] * 4


def test_a_peer_is_shown_with_its_version() -> None:
    cost = Cost("vllm 1.2", 63.5, 35933.4, 0.879, SOURCE)
    assert render_benchmarks.policy_cells(Policy("vllm", cost, None))["policy"].endswith("(1.2)")


def test_every_policy_that_results_can_hold_has_its_row() -> None:
    assert tuple(render_benchmarks.TOLD) == sharing_results.ORDER


def test_cells_are_short() -> None:
    assert render_benchmarks.cell(1.23456) == "1.23"
    assert render_benchmarks.cell(None) == ""
    assert render_benchmarks.cell("x") == "x"
