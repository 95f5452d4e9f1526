"""Draw how many long requests a pool holds, technique upon technique: docs/figures/capacity.svg.

Reads `bench/results/capacity*.json`, written by `kvkeep bench capacity`, and for what each step
costs in answers the figures of `bench/results/quality*.json` of the demo model, the newest of each:
what was not measured is said so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tools.figures.drawing import FIGURES, ROOT, Figure, Rows, plt, rows_of, run

OUT: Final = FIGURES / "capacity.svg"
RESULTS: Final = ROOT / "bench" / "results"
CASES: Final = ("bf16", "+ sharing", "+ k2v2", "+ corm", "k4v2 + corm")
"""Each adds to the one before it, but the last: that one has other codes."""
EXACT: Final = ("bf16", "+ sharing")
"""Whose answers are those of bf16, bit for bit."""
LOSSES: Final = {
    "+ k2v2": "quality_loss_k2v2",
    "+ corm": "combined_quality_loss",
    "k4v2 + corm": "combined_quality_loss_k4v2",
}
"""Figures of `kvkeep bench quality`, relative to the whole cache in 16 bits."""
DEMO: Final = "demo, a toy"


class Bar(NamedTuple):
    """One case: the requests that run at a time, and what is said of its answers."""

    case: str
    requests: int
    quality: str


def measured(folder: Path) -> dict[str, float]:
    """Return what a folder's results say of the demo model's answers; of two the newer counts."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("quality*.json")]
    own = [one for one in found if one["meta"]["params"]["model"] == DEMO]
    figures: dict[str, float] = {}
    for one in sorted(own, key=lambda one: str(one["meta"]["date"])):
        figures |= one["summary"]
    return figures


def quality(case: str, figures: dict[str, float]) -> str:
    """Return what a bar says of its answers."""
    if case in EXACT:
        return "the same\nanswers" if case != "bf16" else "whole cache,\n16 bits"
    loss = figures.get(LOSSES[case])
    return "answers not\nmeasured" if loss is None else f"{100 * loss:.1f} % of\nanswers lost"


def bars(rows: Rows, figures: dict[str, float]) -> list[Bar]:
    """Return the cases in their order."""
    held = {row["case"]: int(row["requests"]) for row in rows if "case" in row}
    return [Bar(case, held[case], quality(case, figures)) for case in CASES if case in held]


def draw(paths: Sequence[Path], folder: Path = RESULTS) -> Figure | None:
    """Return the figure; None without a case."""
    rows = rows_of(paths)
    found = bars(rows, measured(folder))
    if not found:
        return None
    first = next(row for row in rows if "case" in row)
    figure, axes = plt.subplots(figsize=(6.8, 3.8))
    colours = ["C0" if bar.case in CASES[:-1] else "C7" for bar in found]
    names = [bar.case if bar.case in CASES[:-1] else f"instead:\n{bar.case}" for bar in found]
    drawn = axes.bar(names, [bar.requests for bar in found], color=colours, width=0.7)
    axes.bar_label(drawn, [bar.quality for bar in found], fontsize=8, padding=2)
    counts = [str(bar.requests) for bar in found]
    axes.bar_label(drawn, counts, label_type="center", color="white", weight="bold")
    gibibytes, tokens = first["pool_bytes"] / 2**30, first["tokens"]
    axes.set_title(
        f"Requests of {tokens:,} tokens decoding in a pool of {gibibytes:g} GiB", fontsize=11
    )
    axes.set(ylabel="requests at a time", ylim=(0, 1.25 * max(bar.requests for bar in found)))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "capacity", OUT, draw))
