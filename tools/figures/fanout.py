"""Draw tokens per second against requests on one prefix: docs/figures/fanout.svg.

Two panels that never mix: steps of our engine in one process, with the roof and the unshared case;
and servers measured in turn. Reads `bench/results/fanout*.json`, written by `kvkeep bench fanout`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tools.figures.drawing import FIGURES, Figure, Rows, plt, rows_of, run

OUT: Final = FIGURES / "fanout.svg"


class Line(NamedTuple):
    """One curve: requests and tokens per second."""

    label: str
    x: list[int]
    y: list[float]
    style: str


def line(rows: Rows, column: str, label: str, style: str) -> Line:
    """Return one column of rows as a curve over `requests`."""
    ordered = sorted(rows, key=lambda row: int(row["requests"]))
    return Line(label, [r["requests"] for r in ordered], [r[column] for r in ordered], style)


def engine_lines(rows: Rows) -> list[Line]:
    """Return the curves of our engine in one process."""
    shared = [r for r in rows if r.get("case") == "one prefix"]
    apart = [r for r in rows if r.get("case") == "each its own"]
    lines = []
    if shared:
        lines += [
            line(shared, "roof_tokens_per_s", "roof: memory or arithmetic", "k:"),
            line(shared, "tree_tokens_per_s", "kvkeep, prefix read once", "C0o-"),
            line(shared, "request_outer_tokens_per_s", "kvkeep, request by request", "C1s--"),
        ]
    if apart:
        lines.append(line(apart, "tree_tokens_per_s", "each request its own prefix", "C7^-"))
    return lines


def server_lines(rows: Rows) -> list[Line]:
    """Return the curves of servers; ours is drawn once per peer it took turns with."""
    lines = []
    peers = sorted({str(r["peer"]) for r in rows if "peer" in r})
    for index, peer in enumerate(peers):
        own = [r for r in rows if r.get("peer") == peer]
        colour = f"C{index + 2}"
        lines += [
            line(own, "ours_tokens_per_s", f"kvkeep (beside {peer})", "C0" + "os"[index % 2] + "-"),
            line(own, "theirs_tokens_per_s", peer, f"{colour}v--"),
        ]
    return lines


def panel(axes: Axes, title: str, lines: Sequence[Line]) -> None:
    """Draw one panel."""
    for one in lines:
        axes.plot(one.x, one.y, one.style, label=one.label, markersize=4)
    axes.set(title=title, xlabel="requests decoding", ylabel="tokens per second")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def draw(paths: Sequence[Path]) -> Figure | None:
    """Return the figure of all panels that have curves."""
    rows = rows_of(paths)
    panels = [
        ("One process, one prefix of 4,096 tokens", engine_lines(rows)),
        ("Servers in turn, one prefix of 4,096 tokens", server_lines(rows)),
    ]
    drawn = [one for one in panels if one[1]]
    if not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.2 * len(drawn), 3.8), squeeze=False)
    for place, (title, lines) in zip(axes[0], drawn, strict=True):
        panel(place, title, lines)
    return figure


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "fanout", OUT, draw))
