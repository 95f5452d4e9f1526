"""What attention on 2-bit codes is worth: against bfloat16 pages, and against widening the codes.

All sides run on our own kernels with the same prefetching and threads, one after the other, and
walk through enough layers that no K or V is in a cache from the round before. Two more sides read
the same coded tiles: one widens every code to a float in registers, once for all rows of a block,
the other unpacks a tile at a time to bfloat16 for the products that bfloat16 pages take (AVX-512,
2 and 4 bits). What codes gain over widening is over the faster of the two.
`--only grid` and `--only ablations` measure one part.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bench import quant_ablations
from bench.harness import (
    MIN_PAIRS,
    Cell,
    Estimate,
    Figure,
    Goal,
    Options,
    Report,
    Row,
    estimate,
    run,
)
from bench.quant_pages import COLD_BYTES, KV_HEADS, Pages, ns_per_token, pages_of
from kvkeep.engine.sizing import held_bytes
from kvkeep.errors import ConfigError
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.cpu import CpuKernel, available, cpu_ops, decoding_attention
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.quant.codec import Float, KVShape
from kvkeep.quant.hack import Hack
from kvkeep.types import WINDOW_STEP, Layout

Array = NDArray[np.float64]

PARTS: Final = ("grid", "ablations")
GROUPS: Final = (1, 2, 4, 7)
DIMS: Final = (64, 128)
CONTEXTS: Final = (1024, 4096, 16384, 32768)
FIGURE_DIM: Final = 128
FIGURE_CONTEXT: Final = 16384
GOALS: Final = {1: 4.0, 2: 2.5, 4: 2.0, 7: 1.4}
OTHERS: Final = (Layout.K4V2, Layout.K4V4, Layout.K8V8)


class Shape(NamedTuple):
    """One cell of the grid."""

    group: int
    dim: int
    context: int


Side = tuple[CpuAttention, Pages]


class Sides(NamedTuple):
    """Who attends to which pages: bfloat16, codes as they are, to floats and to bfloat16."""

    plain: Side
    coded: Side
    floats: Side
    halves: Side


class Found(NamedTuple):
    """A cell's figures, and its row."""

    over_plain: Estimate
    over_widened: Estimate
    row: Row


def measure_cell(sides: Sides, shape: Shape, layout: Layout, pairs: int, seconds: float) -> Found:
    """Measure the sides of a cell in turn, the order alternating."""
    q = torch.randn(1, KV_HEADS * shape.group, shape.dim).to(torch.bfloat16)
    samples: list[list[float]] = []
    for i in range(pairs):
        order = range(len(sides)) if i % 2 == 0 else range(len(sides))[::-1]
        times = dict.fromkeys(order, 0.0)
        for at in order:
            times[at] = ns_per_token(sides[at], q, seconds)
        samples.append([times[at] for at in range(len(sides))])
    plain, coded, *widened = np.array(samples).T
    over_plain = estimate((plain / coded).tolist())
    over_widened = over_faster(coded, widened)
    ratio = bytes_ratio(sides, q)
    row: dict[str, Cell] = {
        "codes": layout.name,
        "heads per group": shape.group,
        "head_dim": shape.dim,
        "context": shape.context,
        "bf16 ns": float(np.median(plain)),
        "codes ns": float(np.median(coded)),
        "to floats ns": float(np.median(widened[0])),
        "to bf16 ns": float(np.median(widened[1])),
        "over bf16": over_plain.median,
        "over widened": over_widened.median,
        "bytes over bf16": ratio,
    }
    return Found(over_plain, over_widened, row)


def over_faster(coded: Array, widened: Sequence[Array]) -> Estimate:
    """Return what codes gain over the way of widening whose median is the least."""
    faster = min(widened, key=lambda times: float(np.median(times)))
    return estimate((faster / coded).tolist())


def bytes_ratio(sides: Sides, q: torch.Tensor) -> float:
    """Return the bytes that one call reads of coded pages, sinks included, over those of bf16."""
    read = []
    for ops, pages in (sides.coded, sides.plain):
        before = ops.bytes_read
        ops.attend(q, pages.layers[0], pages.plan)
        read.append(ops.bytes_read - before)
    return read[0] / read[1]


def grid(options: Options) -> Mapping[tuple[int, int], Sequence[int]]:
    """Return the groups measured per (head_dim, context)."""
    if options.quick:
        return {(FIGURE_DIM, FIGURE_CONTEXT): GROUPS, (64, 4096): GROUPS[-1:]}
    return {(dim, context): GROUPS for dim in DIMS for context in CONTEXTS}


def summary(found: Mapping[Shape, Found], decode_calls: int) -> list[Figure]:
    """Return the figures at 16,384 tokens of 128 channels."""
    cells = {g: found[Shape(g, FIGURE_DIM, FIGURE_CONTEXT)] for g in GROUPS}
    figures = [
        Figure(f"attend_2bit_vs_bf16_g{g}", cell.over_plain, Goal(">=", GOALS[g]))
        for g, cell in cells.items()
    ]
    worst = min((cell.over_widened for cell in cells.values()), key=lambda e: e.median)
    stored = tile_bytes(Layout.K2V2, FIGURE_DIM) / tile_bytes(Layout.BF16, FIGURE_DIM)
    return [
        *figures,
        Figure("attend_2bit_vs_dequant", worst, Goal(">=", 2.0)),
        exact("bytes_ratio_k2v2_d128", stored, Goal("<=", 0.157)),
        exact("decode_calls_hot_path", float(decode_calls), Goal("<=", 0.0)),
    ]


def request_rows() -> list[Row]:
    """Return what whole requests hold, over bfloat16: counted, and a test holds it to an engine.

    What is in bfloat16 comes and goes with a block, so it is the mean over the block's tokens.
    """
    tile = tile_bytes(Layout.BF16, FIGURE_DIM)
    shape = KVShape(1, KV_HEADS, FIGURE_DIM, Layout.BF16)
    plain = Float().page_spec(shape)
    rows: list[Row] = []
    for layout, tokens in product((Layout.K2V2, *OTHERS), CONTEXTS):
        spec = Hack(layout).page_spec(shape)
        block = range(tokens - WINDOW_STEP + 1, tokens + 1)
        over = [held_bytes(spec, tile, n) / held_bytes(plain, tile, n) for n in block]
        rows.append(
            {
                "codes": layout.name,
                "tokens of a request": tokens,
                "bytes of a layer": held_bytes(spec, tile, tokens),
                "bytes over bf16": over[-1],
                "mean of its last block": sum(over) / len(over),
                "most": max(over),
            }
        )
    return rows


def exact(name: str, value: float, goal: Goal) -> Figure:
    """Return a figure that is counted, not timed."""
    return Figure(name, Estimate(value, value, value, MIN_PAIRS), goal)


def on_grid(kernel: CpuKernel, ops: CpuAttention, options: Options) -> Report:
    """Measure 2-bit codes over the grid, and the other layouts at one shape."""
    floats, halves = (
        decoding_attention(kernel, options.threads, halves=to_halves) for to_halves in (False, True)
    )
    pairs, seconds = (3, 0.05) if options.quick else (MIN_PAIRS, 0.15)
    found: dict[Shape, Found] = {}
    rows = request_rows()
    for (dim, context), groups in grid(options).items():
        plain, coded = (pages_of(x, dim, context) for x in (Layout.BF16, Layout.K2V2))
        sides = Sides((ops, plain), (ops, coded), (floats, coded), (halves, coded))
        for group in groups:
            shape = Shape(group, dim, context)
            found[shape] = measure_cell(sides, shape, Layout.K2V2, pairs, seconds)
            rows.append(found[shape].row)
        if not options.quick and (dim, context) == (FIGURE_DIM, FIGURE_CONTEXT):
            for layout in OTHERS:
                pages = pages_of(layout, dim, context)
                others = Sides((ops, plain), (ops, pages), (floats, pages), (halves, pages))
                shape = Shape(2, dim, context)
                rows.append(measure_cell(others, shape, layout, pairs, seconds).row)
    if not (floats.decode_calls and halves.decode_calls):
        raise RuntimeError("a side that widens codes did not count what it widened")
    return Report("quant", {}, summary(found, ops.decode_calls), rows)


def measure(options: Options) -> Report:
    """Measure the parts that are asked for; all where none is."""
    unknown = set(options.only) - set(PARTS)
    if unknown:
        raise ConfigError(f"only: there is no part {min(unknown)!r}; there are: {', '.join(PARTS)}")
    parts = options.only or PARTS
    kernel = available()[0]
    ops = cpu_ops(kernel, options.threads).attention
    if not isinstance(ops, CpuAttention):
        raise TypeError("this benchmark measures the native kernels")
    torch.set_num_threads(options.threads)
    found: list[Report] = []
    if "grid" in parts:
        found.append(on_grid(kernel, ops, options))
    if "ablations" in parts:
        found.append(quant_ablations.measure(ops, options))
    params: dict[str, Cell] = {
        "kernel": kernel,
        "threads": options.threads,
        "quick": options.quick,
        "kv_heads": KV_HEADS,
        "cold_bytes": COLD_BYTES,
        "parts": ", ".join(parts),
    }
    figures = [figure for report in found for figure in report.figures]
    return Report("quant", params, figures, [row for report in found for row in report.rows])


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("quant", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
