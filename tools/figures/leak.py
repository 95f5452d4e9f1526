"""Draw attack AUC against time to first token, one point per policy and engine.

Writes docs/figures/leak.svg from `bench/results/sharing*.json`. What has no audit stands below the
plot by its time alone, what has no replay in the caption, and so do the commits of both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Final

from matplotlib.axes import Axes

from tools.figures.drawing import FIGURES, Figure, plt, run
from tools.sharing_results import (
    OURS,
    Cost,
    Leak,
    MixedResultsError,
    Policy,
    provenance,
    read,
)

OUT: Final = FIGURES / "leak.svg"
CHANCE: Final = (0.47, 0.53)
WIDTH: Final = 96
"""Characters of a line of the caption."""


def label(policy: Policy, cost: Cost) -> str:
    """Return how a policy is named: with its engine where that is not ours."""
    if cost.engine == OURS:
        return policy.name
    _, _, way = policy.name.partition("_")
    return f"{cost.engine}, {way or 'as it comes'}"


def marker(cost: Cost) -> str:
    """Return the sign of an engine: ours and others'."""
    return "o" if cost.engine == OURS else "s"


def draw_audited(axes: Axes, policies: Sequence[Policy]) -> None:
    """Draw what was measured both ways, with the interval of the attack."""
    axes.axhspan(*CHANCE, color="0.92", label="chance ± 0.03")
    for index, one in enumerate(policies):
        if one.cost is None or one.leak is None:
            continue
        cost, leak = one.cost, one.leak
        axes.errorbar(
            [cost.ttft_ms],
            [leak.auc],
            yerr=errors(leak),
            fmt=marker(cost),
            color=f"C{index}",
            capsize=3,
            label=label(one, cost),
        )
    axes.set(ylabel="attack's AUC, worst index channel", ylim=(0.4, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def errors(leak: Leak) -> list[list[float]]:
    """Return how far the interval reaches down and up."""
    return [[max(0.0, leak.auc - leak.low)], [max(0.0, leak.high - leak.auc)]]


def draw_unaudited(axes: Axes, policies: Sequence[Policy]) -> None:
    """Draw what has a time but no audit, a line each."""
    named = [(label(p, p.cost), p.cost) for p in policies if p.cost and not p.leak]
    for place, (_, cost) in enumerate(named):
        axes.plot([cost.ttft_ms], [place], marker(cost), color="0.4", fillstyle="none")
    axes.set_yticks(range(len(named)), [name for name, _ in named], fontsize=7)
    axes.set(ylim=(len(named) - 0.5, -0.5), facecolor="0.97")
    axes.set_title("no audit recorded: the time alone", fontsize=8, loc="left")
    axes.grid(alpha=0.3)


def caption(policies: Sequence[Policy]) -> str:
    """Return what the figure was drawn from, and what it lacks."""
    lines = provenance(policies)
    no_replay = [p.name for p in policies if p.leak and not p.cost]
    if no_replay:
        lines.append(f"audited but not drawn, for want of a replay: {', '.join(no_replay)}")
    return "\n".join(fill(line, WIDTH) for line in lines)


def draw(paths: Sequence[Path]) -> Figure | None:
    """Return the figure of all policies that have a time; raises `MixedResultsError`."""
    policies = read(paths)
    timed = [p for p in policies if p.cost]
    if not timed:
        return None
    unaudited = sum(p.leak is None for p in timed)
    heights = [3.4, *([0.22 * unaudited + 0.1] if unaudited else [])]
    figure, places = plt.subplots(
        len(heights),
        1,
        figsize=(7.4, sum(heights) + 1.6),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    )
    draw_audited(places[0, 0], policies)
    if unaudited:
        draw_unaudited(places[1, 0], policies)
    told = caption(policies)
    figure.set_label(told)
    last = places[-1, 0]
    last.set_xlim(0, 1.1 * max(p.cost.ttft_ms for p in timed if p.cost))
    last.set_xlabel("median time to first token, ms")
    last.annotate(
        told,
        (0, 0),
        xytext=(0, -34),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=6.5,
        verticalalignment="top",
    )
    return figure


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    try:
        return run(arguments, "sharing", OUT, draw)
    except MixedResultsError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
