"""What reading a shared prefix once is worth, against two ways of reading it for every request.

Every baseline runs on our own kernels, with the same prefetching: request-outer (each request over
all heads), head-outer (each head over all requests, so that a prefix stays in the last-level
cache), two-level (one shared prefix and the rest apart), and torch's SDPA per request; the plans
that FastTree's and PAT's rules choose stand beside ours. Roofs: bytes over the read bandwidth
measured beside the cell, and flops over what the registers multiply.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from bench.attention_cells import (
    MOST_LAYERS,
    CellOf,
    Machine,
    attend_all,
    by_rule,
    ceiling_s,
    cell_of,
    head_outer,
    planner_for,
    sdpa,
    two_level,
)
from bench.attention_grids import FASTTREE, PAT, UNSHARED, Tree, codec, flat_pages
from bench.harness import (
    MIN_PAIRS,
    Cell,
    Estimate,
    Figure,
    Goal,
    Options,
    Pair,
    Report,
    Row,
    estimate,
    interleave,
    run,
)
from kvkeep.attention.edges import fasttree, pat
from kvkeep.attention.planner import FlatPlanner, TreePlanner
from kvkeep.errors import ConfigError
from kvkeep.ops.cpu import DotPeak, cpu_ops
from kvkeep.ops.layout import AttentionPlan
from kvkeep.types import PAGE_TOKENS, BatchGeometry
from kvkeep.types import Layout as TileLayout
from tests.forests import Asked, geometry
from tests.oracles import Heads

COLD_BYTES: Final = 256 << 20
RECORD_BYTES: Final = 64 << 20
CODEC_TOKENS: Final = 16384
STEP_LAYERS: Final = 24
UNSHARED_S: Final = 4.0
TORCH_TURNS: Final = 2
"""Of a cell, since SDPA takes 20 to 80 times ours."""

HEADS: Final = (Heads(32, 8, 128), Heads(32, 32, 128), Heads(16, 1, 128), Heads(14, 2, 64))


@dataclass(frozen=True)
class Measured:
    """A cell's samples."""

    row: Row
    gain: Estimate
    gain_over_heads: Estimate
    gain_over_best: Estimate
    """Over the fastest of request-outer, head-outer and two levels, turn by turn."""
    by_rule: tuple[Estimate, Estimate]
    """Gains of the plans that FastTree's and PAT's rules choose."""
    flat_roof: Estimate
    tree_roof: Estimate
    gain_over_model: Estimate
    bytes_ratio: float
    record: bool
    shared: bool
    makespan: float


def measure_cell(machine: Machine, cell: CellOf, planner: TreePlanner, pairs: int) -> Measured:
    """Measure all ways of attending a cell in turn, `pairs` times; torch's a few times only."""
    flat, ours = FlatPlanner().plan(cell.step), planner.plan(cell.step)
    levels, by_head, torchs = two_level(cell.step), head_outer(machine, cell, flat), sdpa(cell)
    rules = [by_rule(cell.step, rule(cell.heads.q // cell.heads.kv)) for rule in (fasttree, pat)]
    pages, all_pages = int(ours.runs[:, 1].sum()), flat_pages(cell.layout.slots)
    before = machine.ops.bytes_read
    attend_all(machine, cell, ours)
    counted = machine.ops.bytes_read - before
    makespan = machine.ops.makespan_over_bound
    samples: list[tuple[float, ...]] = []
    for turn in range(pairs):
        gb_s, gflop_s = machine.reader.measure_gb_s(), machine.peak.measure_gflop_s()
        times = (
            attend_all(machine, cell, flat),
            attend_all(machine, cell, ours),
            by_head(),
            attend_all(machine, cell, levels),
            *(attend_all(machine, cell, rule) for rule in rules),
            torchs() if turn < TORCH_TURNS else math.nan,
        )
        flat_roof = ceiling_s(cell, all_pages, gb_s, gflop_s)
        tree_roof = ceiling_s(cell, pages, gb_s, gflop_s)
        samples.append((*times, flat_roof, tree_roof, gb_s, gflop_s))
    at = np.array(samples)
    flat_s, ours_s, head_s, level_s, tree_s, pat_s, sdpa_s, flat_roofs, tree_roofs, gb, gf = at.T
    gain = estimate(flat_s / ours_s)
    by_rules = estimate(flat_s / tree_s), estimate(flat_s / pat_s)
    row: dict[str, Cell] = {
        "tree": cell.tree.name,
        "heads": f"{cell.heads.q}/{cell.heads.kv}x{cell.heads.dim}",
        "layer_mb": cell.layer_bytes / 2**20,
        "byte_ratio": all_pages / pages,
        "ours_ms": float(np.median(ours_s)) * 1e3 / len(cell.layers),
        "gain_over_request_outer": gain.median,
        "over_head_outer": float(np.median(head_s / ours_s)),
        "over_two_level": float(np.median(level_s / ours_s)),
        "gain_by_fasttree_rule": by_rules[0].median,
        "gain_by_pat_rule": by_rules[1].median,
        "over_torch_sdpa": float(np.nanmedian(sdpa_s / ours_s)),
        "flat_roof_ratio": float(np.median(flat_roofs / flat_s)),
        "tree_roof_ratio": float(np.median(tree_roofs / ours_s)),
        "read_gb_s": float(np.median(gb)),
        "peak_gflop_s": float(np.median(gf)),
    }
    exact = exact_bytes(cell, ours)
    return Measured(
        row,
        gain,
        estimate(head_s / ours_s),
        estimate(np.minimum(np.minimum(flat_s, head_s), level_s) / ours_s),
        by_rules,
        estimate(flat_roofs / flat_s),
        estimate(tree_roofs / ours_s),
        estimate((flat_s / ours_s) / (flat_roofs / tree_roofs)),
        counted / exact,
        cell.layer_bytes >= RECORD_BYTES and cell.layer_bytes * len(cell.layers) >= COLD_BYTES,
        ours.parents is not None,
        makespan,
    )


def exact_bytes(cell: CellOf, plan: AttentionPlan) -> int:
    """Return the closed form: every page of every group once, in all layers."""
    return int(plan.runs[:, 1].sum()) * cell.page_bytes * len(cell.layers)


def node_kernel(machine: Machine, pairs: int) -> tuple[Figure, list[Row]]:
    """Return warm node kernels' share of the peak at D 128, the worst of 16 to 128 rows.

    One thread, 4,096 tokens (2 MB); eight nodes of as many rows in one call, so that the kernel
    and not the call is timed.
    """
    heads, pages, nodes = Heads(1, 1, 128), 64, 8
    layers = machine.layers(heads, pages)
    assert layers is not None
    one, peak = cpu_ops(machine.kernel, 1).attention, DotPeak(machine.kernel, 1)
    found: list[Estimate] = []
    rows: list[Row] = []
    for queries in (16, 32, 64, 128):
        asked = [Asked(range(pages), pages * PAGE_TOKENS, queries)] * nodes
        plan = FlatPlanner().plan(geometry(asked, TileLayout.BF16))
        plan.row_positions[:] = pages * PAGE_TOKENS - 1
        q = torch.randn(nodes * queries, 1, 128).to(torch.bfloat16)
        flops = 4.0 * 128 * len(q) * pages * PAGE_TOKENS
        one.attend(q, layers[0], plan)
        shares = []
        for _ in range(2 * max(pairs, MIN_PAIRS)):
            begun = time.perf_counter()
            one.attend(q, layers[0], plan)
            took = time.perf_counter() - begun
            shares.append(flops / took / 1e9 / peak.measure_gflop_s())
        found.append(estimate(shares))
        rows.append({"node rows": queries, "share_of_peak": found[-1].median})
    worst = min(found, key=lambda e: e.median)
    return Figure("node_kernel_ratio", worst, Goal(">=", 0.85)), rows


class Planned:
    """A step of 24 layers, planning included: calling it returns its seconds."""

    def __init__(
        self, machine: Machine, cell: CellOf, plan: Callable[[BatchGeometry], AttentionPlan]
    ) -> None:
        self._machine = machine
        self._cell = cell
        self._plan = plan
        self.planning_s: list[float] = []

    def __call__(self) -> float:
        """Plan, attend, and return the seconds both took."""
        cell, begun = self._cell, time.perf_counter()
        plan = self._plan(cell.step)
        self.planning_s.append(time.perf_counter() - begun)
        for i in range(STEP_LAYERS):
            self._machine.ops.attend(cell.q, cell.layers[i % len(cell.layers)], plan)
        return time.perf_counter() - begun


def unshared(machine: Machine, planner: TreePlanner, least: int) -> tuple[Figure, list[Row]]:
    """Return planning and attending over flat's, where nothing is shared: the worst case.

    Both ways go through the same code but for the planner. A step takes 1 to 20 ms, so pairs are
    taken until the machine's slow moments have met both: `UNSHARED_S` seconds, not less than
    `least` of them.
    """
    worst: Estimate | None = None
    rows: list[Row] = []
    for batch, tokens in ((1, 512), (8, 512), (64, 256), (1, 8192), (16, 2048)):
        cell = cell_of(machine, Tree("unshared", (batch,), (tokens,)), Heads(14, 2, 64))
        assert cell is not None
        ours, flat = (
            Planned(machine, cell, planner.plan),
            Planned(machine, cell, FlatPlanner().plan),
        )
        ours(), flat()
        pairs: list[Pair] = []
        until = time.perf_counter() + (UNSHARED_S if least >= MIN_PAIRS else 0.0)
        while len(pairs) < least or time.perf_counter() < until:
            pairs += interleave(ours, flat, 2)
        found = estimate([pair.ours / pair.theirs for pair in pairs])
        rows.append(
            {
                "unshared requests": batch,
                "tokens": tokens,
                "pairs": len(pairs),
                "over_flat": found.median,
                "step_ms": float(np.median([pair.theirs for pair in pairs])) * 1e3,
                "plan_us": float(np.median(ours.planning_s)) * 1e6,
                "flat_plan_us": float(np.median(flat.planning_s)) * 1e6,
            }
        )
        if worst is None or found.median > worst.median:
            worst = found
    assert worst is not None
    return Figure("worst_unshared_ratio", worst, Goal("<=", 1.025)), rows


PARTS: Final = ("codec", "fasttree", "pat", "unshared")


def grid(options: Options) -> list[tuple[Tree, Heads]]:
    """Return the cells: every tree at all heads."""
    sweeps = codec(CODEC_TOKENS)
    if options.quick:
        some = [sweeps[0], sweeps[13], FASTTREE[8], PAT[0]]
        return [(tree, HEADS[0]) for tree in some] + [(sweeps[13], HEADS[1])]
    unknown = sorted({*options.only} - {*PARTS})
    if unknown:
        raise ConfigError(f"only: there is no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    parts = options.only or PARTS
    cells: list[tuple[Tree, Heads]] = []
    if "codec" in parts:
        cells += [(Tree("16 on 4096", (1, 16), (4096, 64)), HEADS[1])]
    grids = (("codec", sweeps), ("fasttree", FASTTREE), ("pat", PAT), ("unshared", UNSHARED))
    for name, trees in grids:
        if name in parts:
            cells += [(tree, heads) for heads in HEADS for tree in trees]
    return cells


def worst_of(name: str, found: Sequence[Estimate], goal: Goal | None = None) -> list[Figure]:
    """Return the lowest estimate as a figure; none where there is no cell."""
    return [Figure(name, min(found, key=lambda e: e.median), goal)] if found else []


def mean_of(name: str, found: Sequence[Estimate], goal: Goal | None = None) -> Figure:
    """Return the mean of estimates as a figure."""
    mean, low, high = (
        float(np.mean([getattr(e, field) for e in found])) for field in Estimate._fields[:3]
    )
    return Figure(name, Estimate(mean, low, high, found[0].samples), goal)


def summary(cells: Sequence[tuple[Tree, Heads, Measured]]) -> list[Figure]:
    """Return the figures of the grid."""
    record = [m for _, _, m in cells if m.record]
    swept = [m for t, _, m in cells if t in codec(CODEC_TOKENS)]
    sweep = [m.gain for m in swept]
    figures = worst_of("flat_roof_ratio_min", [m.flat_roof for m in record], Goal(">=", 0.8))
    figures += worst_of("tree_roof_ratio_min", [m.tree_roof for m in record], Goal(">=", 0.8))
    figures += worst_of(
        "gain_over_model_min", [m.gain_over_model for m in record if m.shared], Goal(">=", 0.9)
    )
    if sweep:
        best = max(sweep, key=lambda e: e.median)
        figures += [
            mean_of("codec_grid_mean", sweep, Goal(">=", 2.2)),
            Figure("codec_grid_max", best, Goal(">=", 5.0)),
            mean_of("codec_mean_by_fasttree_rule", [m.by_rule[0] for m in swept]),
            mean_of("codec_mean_by_pat_rule", [m.by_rule[1] for m in swept]),
        ]
    shared = [m for _, _, m in cells if m.shared]
    figures += worst_of("shared_gain_min", [m.gain for m in shared], Goal(">=", 1.0))
    figures += worst_of("shared_gain_over_best_min", [m.gain_over_best for m in shared])
    mha = [m.gain_over_heads for t, h, m in cells if t.name == "16 on 4096" and h == HEADS[1]]
    figures += worst_of("mha_16_vs_head_outer", mha, Goal(">=", 1.8))
    exact = max(max(m.bytes_ratio, 1 / m.bytes_ratio) for _, _, m in cells)
    spans = max(m.makespan for _, _, m in cells)
    count = MIN_PAIRS
    return [
        *figures,
        Figure("bytes_vs_exact", Estimate(exact, exact, exact, count), Goal("<=", 1.0)),
        Figure("makespan_over_bound", Estimate(spans, spans, spans, count), Goal("<=", 1.17)),
    ]


def measure(options: Options) -> Report:
    """Measure the grids, the node kernel and what planning costs where it gains nothing."""
    machine = Machine(options.threads)
    pairs = 3 if options.quick else MIN_PAIRS
    cells: list[tuple[Tree, Heads, Measured]] = []
    planners = {heads: planner_for(machine, heads) for heads in HEADS}
    for tree, heads in grid(options):
        cell = cell_of(machine, tree, heads)
        if cell is not None:
            # A copy: cells' requests have the same numbers, and a planner goes on from the last.
            cells.append((tree, heads, measure_cell(machine, cell, copy(planners[heads]), pairs)))
    node, node_rows = node_kernel(machine, pairs)
    lost, lost_rows = unshared(machine, planners[HEADS[3]], 5 if options.quick else 30)
    rows: list[Row] = [m.row for _, _, m in cells]
    params: dict[str, Cell] = {
        "kernel": machine.kernel,
        "threads": options.threads,
        "quick": options.quick,
        "layers_cycled": MOST_LAYERS,
        "codec_tokens": CODEC_TOKENS,
        "parts": ", ".join(options.only or PARTS),
        "dtype": "bfloat16",
    }
    return Report(
        "attention", params, [*summary(cells), node, lost], [*rows, *node_rows, *lost_rows]
    )


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("attention", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
