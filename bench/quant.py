"""What attention on 2-bit codes is worth: against bfloat16 pages, and against widening the codes.

All sides run on our own kernels with the same prefetching and threads, one after the other, and
walk through enough layers that no K or V is in a cache from the round before. The third side reads
the same coded tiles and widens every code to a float in registers, once for all rows of a group.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

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
from bench.memory import huge
from kvkeep.ops.codes import pack_codes, pack_sinks, tile_bytes
from kvkeep.ops.cpu import available, cpu_ops, decoding_attention
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import AttentionPlan, LayerKV, Run
from kvkeep.types import PAGE_TOKENS, Layout
from tests.coded import random_codes

COLD_BYTES: Final = 96 << 20
KV_HEADS: Final = 8
GROUPS: Final = (1, 2, 4, 7)
DIMS: Final = (64, 128)
CONTEXTS: Final = (1024, 4096, 16384, 32768)
FIGURE_DIM: Final = 128
FIGURE_CONTEXT: Final = 16384
GOALS: Final = {1: 4.0, 2: 2.5, 4: 2.0, 7: 1.4}
OTHERS: Final = (Layout.K4V2, Layout.K4V4, Layout.K8V8)
UNIT: Final = 64


class Shape(NamedTuple):
    """One cell of the grid."""

    group: int
    dim: int
    context: int


@dataclass(frozen=True)
class Pages:
    """Layers of one context that together leave the caches, and the plan of a row at its end."""

    layers: list[LayerKV]
    plan: AttentionPlan


class Sides(NamedTuple):
    """Who attends to which pages: bfloat16, codes as they are, codes widened."""

    plain: tuple[CpuAttention, Pages]
    coded: tuple[CpuAttention, Pages]
    widened: tuple[CpuAttention, Pages]


class Found(NamedTuple):
    """A cell's figures, and its row."""

    over_plain: Estimate
    over_widened: Estimate
    row: Row


def sample_tiles(layout: Layout, dim: int, *, first: bool) -> torch.Tensor:
    """Return tiles [64, bytes] of random numbers."""
    if layout == Layout.BF16:
        numbers = torch.randn(64, 2 * PAGE_TOKENS * dim).to(torch.bfloat16)
        return numbers.view(torch.uint8)
    tiles = pack_codes(random_codes(np.random.default_rng(0), layout, 64, dim), layout)
    if not first:
        return tiles
    k, v = torch.randn(2, 64, 4, dim)
    return torch.cat([tiles, pack_sinks(k, v)], 1)


def pages_of(layout: Layout, dim: int, context: int, cold_bytes: int = COLD_BYTES) -> Pages:
    """Return layers of one context, their tiles in any order, in huge memory pages."""
    count = context // PAGE_TOKENS
    sizes = [tile_bytes(layout, dim, first=True), tile_bytes(layout, dim)]
    layer_bytes = KV_HEADS * (sizes[0] + (count - 1) * sizes[1])
    layers = -(-cold_bytes // layer_bytes)
    memory = huge(layers * layer_bytes)
    table = np.empty((count, layers, KV_HEADS), np.int32)
    rng, begin = np.random.default_rng(0), 0
    for rows, size in ((slice(0, 1), sizes[0]), (slice(1, None), sizes[1])):
        part = table[rows]
        ids = rng.permutation(part.size) * (size // UNIT) + begin // UNIT
        part[...] = ids.reshape(part.shape)
        sample = sample_tiles(layout, dim, first=rows.start == 0)
        tiles = memory[begin : begin + part.size * size].view(-1, size)
        for at in range(0, len(tiles), len(sample)):
            tiles[at : at + len(sample)] = sample[: len(tiles) - at]
        begin += part.size * size
    plan = AttentionPlan(
        np.array([context - 1], np.int32),
        np.array([[0, 1, 0, 1]], np.int32),
        np.array([Run(0, count, 0, int(layout))], np.int32),
        np.arange(count, dtype=np.int32),
    )
    found = [LayerKV(memory, table, UNIT, layer, KV_HEADS, dim) for layer in range(layers)]
    return Pages(found, plan)


def ns_per_token(side: tuple[CpuAttention, Pages], q: torch.Tensor, seconds: float) -> float:
    """Return nanoseconds per token and KV head of passes over all layers."""
    ops, pages = side
    rounds, begun = 0, time.perf_counter()
    while rounds == 0 or time.perf_counter() - begun < seconds:
        for kv in pages.layers:
            ops.attend(q, kv, pages.plan)
        rounds += 1
    taken = time.perf_counter() - begun
    tokens = len(pages.plan.pages) * PAGE_TOKENS
    return taken * 1e9 / (rounds * len(pages.layers) * tokens * KV_HEADS)


def measure_cell(sides: Sides, shape: Shape, layout: Layout, pairs: int, seconds: float) -> Found:
    """Measure the three sides of a cell in turn, the order alternating."""
    q = torch.randn(1, KV_HEADS * shape.group, shape.dim).to(torch.bfloat16)
    samples: list[list[float]] = []
    for i in range(pairs):
        order = range(len(sides)) if i % 2 == 0 else range(len(sides))[::-1]
        times = dict.fromkeys(order, 0.0)
        for at in order:
            times[at] = ns_per_token(sides[at], q, seconds)
        samples.append([times[at] for at in range(len(sides))])
    plain, coded, widened = np.array(samples).T
    over_plain = estimate((plain / coded).tolist())
    over_widened = estimate((widened / coded).tolist())
    ratio = bytes_ratio(sides, q)
    row: dict[str, Cell] = {
        "codes": layout.name,
        "heads per group": shape.group,
        "head_dim": shape.dim,
        "context": shape.context,
        "bf16 ns": float(np.median(plain)),
        "codes ns": float(np.median(coded)),
        "widened ns": float(np.median(widened)),
        "over bf16": over_plain.median,
        "over widened": over_widened.median,
        "bytes over bf16": ratio,
    }
    return Found(over_plain, over_widened, row)


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


def exact(name: str, value: float, goal: Goal) -> Figure:
    """Return a figure that is counted, not timed."""
    return Figure(name, Estimate(value, value, value, MIN_PAIRS), goal)


def measure(options: Options) -> Report:
    """Measure 2-bit codes over the grid, and the other layouts at one shape."""
    kernel = available()[0]
    ops = cpu_ops(kernel, options.threads).attention
    widening = decoding_attention(kernel, options.threads)
    if not isinstance(ops, CpuAttention):
        raise TypeError("this benchmark measures the native kernels")
    torch.set_num_threads(options.threads)
    pairs, seconds = (3, 0.05) if options.quick else (MIN_PAIRS, 0.15)
    found: dict[Shape, Found] = {}
    rows: list[Row] = []
    for (dim, context), groups in grid(options).items():
        plain, coded = (pages_of(x, dim, context) for x in (Layout.BF16, Layout.K2V2))
        sides = Sides((ops, plain), (ops, coded), (widening, coded))
        for group in groups:
            shape = Shape(group, dim, context)
            found[shape] = measure_cell(sides, shape, Layout.K2V2, pairs, seconds)
            rows.append(found[shape].row)
        if not options.quick and (dim, context) == (FIGURE_DIM, FIGURE_CONTEXT):
            for layout in OTHERS:
                pages = pages_of(layout, dim, context)
                others = Sides((ops, plain), (ops, pages), (widening, pages))
                shape = Shape(2, dim, context)
                rows.append(measure_cell(others, shape, layout, pairs, seconds).row)
    params: dict[str, Cell] = {
        "kernel": kernel,
        "threads": options.threads,
        "quick": options.quick,
        "kv_heads": KV_HEADS,
        "cold_bytes": COLD_BYTES,
    }
    if not widening.decode_calls:
        raise RuntimeError("the side that widens codes did not count what it widened")
    return Report("quant", params, summary(found, ops.decode_calls), rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("quant", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
