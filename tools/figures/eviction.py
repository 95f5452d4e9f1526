"""Draw what each layer and KV head kept under CORM, one heat map per model and protocol.

Writes docs/figures/eviction.svg. Reads the rows of `bench/results/eviction*.json` that name a
layer and a head; `kvkeep bench eviction` writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from tools.figures.drawing import FIGURES, Figure, plt, rows_of, run

OUT: Final = FIGURES / "eviction.svg"
COLUMN: Final = "kept_by_head"
TITLES: Final = {"after": "question afterwards", "before": "question in the prompt"}


def draw(paths: Sequence[Path]) -> Figure | None:
    """Return the figure of all heads."""
    found = [row for row in rows_of(paths) if COLUMN in row]
    if not found:
        return None
    models = list(dict.fromkeys(str(row["model"]) for row in found))
    asked = list(dict.fromkeys(str(row["question"]) for row in found))
    figure, axes = plt.subplots(
        len(asked), len(models), squeeze=False, figsize=(2.6 * len(models), 2.4 * len(asked))
    )
    for i, question in enumerate(asked):
        for j, model in enumerate(models):
            own = [r for r in found if (r["model"], r["question"]) == (model, question)]
            grid = np.zeros((1 + max(r["layer"] for r in own), 1 + max(r["head"] for r in own)))
            for r in own:
                grid[r["layer"], r["head"]] = r[COLUMN]
            ax = axes[i][j]
            ax.imshow(grid, vmin=0, vmax=1, cmap="magma", aspect="auto")
            for (layer, head), kept in np.ndenumerate(grid):
                colour = "white" if kept < 0.6 else "black"
                ax.text(head, layer, f"{kept:.0%}", ha="center", va="center", color=colour)
            ax.set(xticks=range(grid.shape[1]), yticks=range(grid.shape[0]))
            ax.set(xlabel="KV head", ylabel="layer")
            ax.set_title(f"{model}\n{TITLES.get(question, question)}", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "eviction", OUT, draw))
