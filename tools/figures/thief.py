"""Draw how many tokens stolen pages give away to somebody with the public weights, per mode.

A bar is what is found with no text known, a mark what is found where a quarter of it is.

Writes docs/figures/thief.svg from `bench/results/shield*.json`, and beside the bars what faults and
destroyed keys left, where `bench/results/tiers*.json` or the same files say it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tools.figures.drawing import FIGURES, ROOT, Figure, Rows, plt, rows_of, run

OUT: Final = FIGURES / "thief.svg"
COLUMN: Final = "stolen"
TITLES: Final = {"off": "as computed", "seal": "sealed"}
KNOWN: Final = "a quarter of the text known"
BESIDE: Final = {
    "restart_hit_ratio": "found again after kill -9 and start: {:.1%}",
    "wrong_tokens_in_fault_runs": "wrong tokens after injected faults: {:.0f}",
    "shred_s": "a tenant's pages are dead {:.2g} s after shred",
}
"""Figures of the summary that stand beside the bars, where they were measured."""


def draw(paths: Sequence[Path]) -> Figure | None:
    """Return the figure of all modes."""
    rows = rows_of(paths)
    found = [row for row in rows if COLUMN in row]
    if not found:
        return None
    modes = list(dict.fromkeys(str(row[COLUMN]) for row in found))
    cases = list(dict.fromkeys((str(row["model"]), str(row["kv"])) for row in found))
    figure, ax = plt.subplots(figsize=(7.4, 3.4))
    width = 0.8 / len(cases)
    for i, (model, kv) in enumerate(cases):
        for j, mode in enumerate(modes):
            x = j + (i - (len(cases) - 1) / 2) * width
            for row in found:
                if (row[COLUMN], row["model"], row["kv"]) != (mode, model, kv):
                    continue
                if row["known"]:
                    ax.plot([x], [row["top1"]], "kD", markersize=4, label=KNOWN)
                else:
                    _bar(ax, x, row, width, i, first=not j)
    ax.set_xticks(range(len(modes)), [TITLES.get(mode, mode) for mode in modes])
    ax.set(ylabel="tokens named by the best attack", ylim=(0, 1.12))
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    ax.legend(once.values(), once, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    told = beside(rows)
    figure.set_label("\n".join(told))
    ax.annotate(
        "\n".join(told),
        (1.02, 0.02),
        xycoords="axes fraction",
        fontsize=7,
        verticalalignment="bottom",
    )
    return figure


def _bar(ax: Any, x: float, row: dict[str, Any], width: float, index: int, *, first: bool) -> None:
    label = f"{row['model']}, {row['kv']}" if first else None
    ax.bar(x, row["top1"], width, color=f"C{index}", label=label)
    ax.text(x, row["top1"] + 0.01, f"{row['top1']:.0%}", ha="center", fontsize=6)


def beside(rows: Rows) -> list[str]:
    """Return what the results say of faults, restarts and destroyed keys, a line each."""
    known = {row["figure"]: row["median"] for row in rows if "median" in row}
    return [text.format(known[name]) for name, text in BESIDE.items() if name in known]


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    results = ROOT / "bench" / "results"
    own = [str(p) for name in ("shield", "tiers") for p in sorted(results.glob(f"{name}*.json"))]
    return run(list(arguments) or own, "shield", OUT, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
