"""What attention on 2-bit codes is worth on a CUDA device, at contexts of 1K to 128K tokens.

Ours multiplies codes as bytes; beside it, on the same tiles, the same kernel with every code
widened to the model's dtype first, our kernel on bfloat16 pages, torch's SDPA, and FlashInfer's
paged decode where the package is there. One new row per request. Every pass is captured as a graph
where that works, so that launching costs no side anything; layers are cycled as in `attention_gpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import torch

from bench.attention_gpu import (
    COLD_BYTES,
    POOL_BYTES,
    DeviceCell,
    Pass,
    cell_of,
    ours,
    peers_of,
    seconds,
)
from bench.attention_grids import Tree
from bench.harness import MIN_PAIRS, Cell, Estimate, Figure, Goal, Options, Report, Row, run
from bench.harness import estimate as estimate_of
from bench.quant_pages import sample_tiles
from kvkeep.attention.planner import FlatPlanner
from kvkeep.errors import ConfigError
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.layout import AttentionPlan, LayerKV
from kvkeep.types import PAGE_TOKENS, Layout
from tests.oracles import Heads

CONTEXTS: Final = (1024, 4096, 16_384, 32_768, 131_072)
HEADS: Final = (Heads(32, 8, 128), Heads(16, 8, 128), Heads(14, 2, 64))
LAYOUTS: Final = (Layout.K2V2, Layout.K4V2, Layout.K8V8)
REQUESTS: Final = (1, 8)
GOALS: Final = {32_768: 2.0, 131_072: 3.0}
MOST_LAYERS: Final = 32
UNIT: Final = 64


class Found(NamedTuple):
    """A cell's row and what its figures need."""

    row: Row
    context: int
    over_plain: Estimate
    """FlashInfer's time over ours; our kernel's on bfloat16 pages where that is not there."""
    over_widened: Estimate


def coded_layers(cell: DeviceCell, layout: Layout) -> list[LayerKV]:
    """Return layers of random coded tiles for a cell's page slots, in any order."""
    heads, device = cell.heads, cell.q.device
    firsts = sorted({own[0] for own in cell.slots})
    pages = 1 + max(slot for own in cell.slots for slot in own)
    rest = sorted(set(range(pages)) - set(firsts))
    sizes = [tile_bytes(layout, heads.dim, first=True), tile_bytes(layout, heads.dim)]
    layer_bytes = heads.kv * (len(firsts) * sizes[0] + len(rest) * sizes[1])
    samples = [sample_tiles(layout, heads.dim, first=first).to(device) for first in (True, False)]
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(min(MOST_LAYERS, 1 + COLD_BYTES // layer_bytes)):
        memory = torch.empty(layer_bytes, dtype=torch.uint8, device=device)
        table = np.empty((pages, 1, heads.kv), np.int32)
        begin = 0
        for slots, size, sample in zip((firsts, rest), sizes, samples, strict=True):
            count = len(slots) * heads.kv
            ids = rng.permutation(count) * (size // UNIT) + begin // UNIT
            table[slots] = ids.reshape(-1, 1, heads.kv)
            drawn = torch.from_numpy(rng.integers(0, len(sample), count)).to(device)
            end = begin + count * size
            memory[begin:end].view(count, size).copy_(sample[drawn])
            begin = end
        there = torch.from_numpy(table).to(device)
        layers.append(LayerKV(memory, table, UNIT, 0, heads.kv, heads.dim, there))
    return layers


def coded_plan(plan: AttentionPlan, layout: Layout) -> AttentionPlan:
    """Return a plan whose runs are all coded."""
    runs = plan.runs.copy()
    runs[:, 3] = int(layout)
    return replace(plan, runs=runs)


def captured(once: Pass, device: torch.device) -> tuple[Pass, bool]:
    """Return a pass as a graph, and whether it is one: not everything can be captured."""
    if device.type != "cuda":
        return once, False
    for _ in range(2):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            once()
    except RuntimeError:
        return once, False
    return graph.replay, True


def measure_cell(cell: DeviceCell, layout: Layout, pairs: int) -> Found:
    """Measure all ways of attending a cell in turn, `pairs` times; times are per layer."""
    device = cell.q.device
    plain = FlatPlanner().plan(cell.step)
    coded, plan = replace(cell, layers=coded_layers(cell, layout)), coded_plan(plain, layout)
    sides = {
        "codes": (ours(coded, plan), coded),
        "widened": (ours(coded, plan, decode=True), coded),
        "bf16": (ours(cell, plain), cell),
        **{name: (once, cell) for name, once in peers_of(cell).items()},
    }
    passes = {name: captured(once, device) for name, (once, _) in sides.items()}
    times = {name: np.zeros(pairs) for name in sides}
    for i in range(pairs):
        for name, (once, _) in passes.items():
            times[name][i] = seconds(once, device) / len(sides[name][1].layers)
    gains = {name: estimate_of((taken / times["codes"]).tolist()) for name, taken in times.items()}
    context, heads = cell.lengths[0], cell.heads
    tokens = context * len(cell.lengths) * heads.kv
    taken_s = float(np.median(times["codes"]))
    row: dict[str, Cell] = {
        "layout": layout.name,
        "heads": f"{heads.q}/{heads.kv}x{heads.dim}",
        "requests": len(cell.lengths),
        "context": context,
        "us": taken_s * 1e6,
        "gb_s": tokens / PAGE_TOKENS * tile_bytes(layout, heads.dim) / taken_s / 1e9,
        "graphs": all(graph for _, graph in passes.values()),
    }
    for name in ("widened", "bf16", "torch_sdpa", "flashinfer_decode"):
        row[f"over_{name}"] = gains[name].median if name in gains else None
    over_plain = gains.get("flashinfer_decode", gains["bf16"])
    return Found(row, context, over_plain, gains["widened"])


def grid(*, quick: bool) -> list[tuple[Heads, int, int, Layout]]:
    """Return cells: heads, requests, context, layout; few where `quick`."""
    if quick:
        return [(HEADS[0], 1, context, Layout.K2V2) for context in GOALS]
    return [
        (heads, requests, context, layout)
        for heads in HEADS
        for requests in REQUESTS
        for context in CONTEXTS
        for layout in LAYOUTS
    ]


def figures_of(found: Sequence[Found]) -> list[Figure]:
    """Return the lowest gains at the contexts that have goals, of two-bit pages."""
    figures = []
    for context, goal in GOALS.items():
        own = [f for f in found if f.context == context and f.row["layout"] == Layout.K2V2.name]
        for name, gains in (
            ("bf16", [f.over_plain for f in own]),
            ("widened", [f.over_widened for f in own]),
        ):
            if gains:
                worst = min(gains, key=lambda e: e.median)
                label = f"gpu_codes_over_{name}_{context // 1024}k"
                figures.append(Figure(label, worst, Goal(">=", goal)))
    return figures


def measure(options: Options) -> Report:
    """Measure the grid on the first CUDA device; a cell that does not fit is left out."""
    if not torch.cuda.is_available():
        raise ConfigError("bench: codes_gpu needs a CUDA device; use quant on a CPU")
    device = torch.device("cuda")
    pairs = 3 if options.quick else MIN_PAIRS
    found = []
    for heads, requests, context, layout in grid(quick=options.quick):
        tree = Tree(f"{requests}x{context}", (requests,), (context,))
        cell = cell_of(tree, heads, torch.bfloat16, device, POOL_BYTES)
        if cell is not None:
            found.append(measure_cell(cell, layout, pairs))
    params: dict[str, Cell] = {
        "device": torch.cuda.get_device_name(device),
        "quick": options.quick,
        "page_tokens": PAGE_TOKENS,
    }
    return Report("codes_gpu", params, figures_of(found), [one.row for one in found])


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("codes_gpu", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
