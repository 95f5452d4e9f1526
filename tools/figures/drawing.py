"""What every figure shares: the rows it reads, the file it writes, what it says without rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "kvkeep"

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["FIGURES", "Figure", "Rows", "plt", "rows_of", "run"]

ROOT: Final = Path(__file__).resolve().parents[2]
FIGURES: Final = ROOT / "docs" / "figures"

Rows = Sequence[dict[str, Any]]


def rows_of(paths: Sequence[Path]) -> Rows:
    """Return the rows of all these result files."""
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def run(
    arguments: Sequence[str],
    bench: str,
    out: Path,
    draw: Callable[[Sequence[Path]], Figure | None],
) -> int:
    """Draw from the given result files, or from all of `bench/results/<bench>*.json`.

    A figure's label, where it has one, goes into the file as its description.
    """
    found = [Path(a) for a in arguments] or sorted((ROOT / "bench/results").glob(f"{bench}*.json"))
    figure = draw(found)
    if figure is None:
        sys.stderr.write(
            f"no results: run `kvkeep bench {bench} --json bench/results/{bench}.json`\n"
        )
        return 1
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None, "Description": figure.get_label() or None})
    plt.close(figure)
    return 0
