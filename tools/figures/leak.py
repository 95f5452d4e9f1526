"""Draw attack AUC against time to first token, one point per policy and engine.

Writes docs/figures/leak.svg. Reads the rows of `bench/results/sharing*.json` that have an engine, a
policy, a median time to first token and an attack's AUC; `kvkeep bench sharing` writes them.
"""

from __future__ import annotations

import sys
from typing import Final, NamedTuple

from tools.figures.drawing import FIGURES, Figure, Rows, plt, run

OUT: Final = FIGURES / "leak.svg"
COLUMNS: Final = ("engine", "policy", "ttft_median_ms", "attack_auc", "attack_auc_halfwidth")
MARKERS: Final = "os^vDP"


class Point(NamedTuple):
    """One policy of one engine."""

    engine: str
    policy: str
    ttft_ms: float
    auc: float
    halfwidth: float


def points(rows: Rows) -> list[Point]:
    """Return the points among a result file's rows."""
    whole = [row for row in rows if all(row.get(column) is not None for column in COLUMNS)]
    return [
        Point(str(r["engine"]), str(r["policy"]), *(float(r[column]) for column in COLUMNS[2:]))
        for r in whole
    ]


def draw(rows: Rows) -> Figure | None:
    """Return the figure of all points."""
    found = points(rows)
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    axes.axhspan(0.47, 0.53, color="0.92", label="chance ± 0.03")
    for marker, engine in zip(MARKERS, sorted({p.engine for p in found}), strict=False):
        own = [p for p in found if p.engine == engine]
        axes.errorbar(
            [p.ttft_ms for p in own],
            [p.auc for p in own],
            yerr=[p.halfwidth for p in own],
            fmt=marker,
            capsize=3,
            label=engine,
        )
        for p in own:
            axes.annotate(
                p.policy, (p.ttft_ms, p.auc), (6, 5), textcoords="offset points", fontsize=8
            )
    axes.set(xlabel="median time to first token, ms", ylabel="attack AUC, worst channel")
    axes.set_ylim(0.4, 1.05)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "sharing", OUT, draw))
