"""Draw how many long requests a pool holds, technique upon technique: docs/figures/capacity.svg.

Reads `bench/results/capacity*.json`, written by `kvkeep bench capacity`, and for what each step
costs in answers the figures of the other result files: what was not measured is said so.
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
CASES: Final = ("bf16", "+ sharing", "+ k2v2", "+ corm")
EXACT: Final = ("bf16", "+ sharing")
"""Whose answers are those of bf16, bit for bit."""
LOSSES: Final = {"+ k2v2": "quality_loss_k2v2", "+ corm": "combined_quality_loss"}
"""Figures of other benchmarks, relative to the whole cache in 16 bits."""


class Bar(NamedTuple):
    """One case: the requests that run at a time, and what is said of its answers."""

    case: str
    requests: int
    quality: str


def measured(folder: Path) -> dict[str, float]:
    """Return the summary figures of all result files of a folder."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        found |= json.loads(path.read_text(encoding="utf-8")).get("summary", {})
    return found


def quality(case: str, figures: dict[str, float]) -> str:
    """Return what a bar says of its answers."""
    if case in EXACT:
        return "the same bits" if case != "bf16" else "the baseline"
    loss = figures.get(LOSSES[case])
    return "quality not measured" if loss is None else f"{100 * loss:.1f} % of answers lost"


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
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    drawn = axes.bar([bar.case for bar in found], [bar.requests for bar in found], color="C0")
    labels = [f"{bar.requests}\n{bar.quality}" for bar in found]
    axes.bar_label(drawn, labels, fontsize=8, padding=2)
    gibibytes, tokens = first["pool_bytes"] / 2**30, first["tokens"]
    axes.set(
        title=f"Requests of {tokens:,} tokens decoding in a pool of {gibibytes:g} GiB",
        ylabel="requests at a time",
        ylim=(0, 1.25 * max(bar.requests for bar in found)),
    )
    axes.grid(axis="y", alpha=0.3)
    return figure


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "capacity", OUT, draw))
