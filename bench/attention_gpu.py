"""The attention grids on a CUDA device: ours, flat and as a tree, beside torch and FlashInfer.

Ours reads tiles through Triton's kernels; flat is one reading per request, the tree one per node,
two levels one per root; the plans of FastTree's and PAT's rules run on the same kernels. Costs are
measured on the device, once for each shape of heads. torch's SDPA runs request by request over K
and V that lie contiguous. FlashInfer's paged decode and, where a tree has two levels, its cascade
run where the package is there. Layers are cycled so that a cell does not stay in the device's
cache. Times are of queued passes, by events.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from bench.attention_cells import by_rule, two_level
from bench.attention_grids import FASTTREE, PAT, UNSHARED, Tree, codec, flat_pages, laid_out
from bench.harness import MIN_PAIRS, Cell, Estimate, Figure, Goal, Options, Report, Row, run
from bench.harness import estimate as estimate_of
from kvkeep.attention.cost import DEVICE_SEED, CostModel
from kvkeep.attention.edges import fasttree, pat
from kvkeep.attention.planner import FlatPlanner, TreePlanner
from kvkeep.attention.profile import Bench, on_device, profile
from kvkeep.errors import ConfigError
from kvkeep.ops.device import programs_of
from kvkeep.ops.layout import ROW_LAYOUTS, AttentionPlan, LayerKV, float_tile_bytes
from kvkeep.ops.triton_attention import TritonAttention
from kvkeep.types import PAGE_TOKENS, BatchGeometry
from tests.forests import Asked, geometry
from tests.oracles import Heads

CODEC_TOKENS: Final = 120_000
HEADS: Final = (Heads(32, 8, 128), Heads(32, 32, 128), Heads(16, 1, 128), Heads(14, 2, 64))
COLD_BYTES: Final = 256 << 20
MOST_LAYERS: Final = 8
POOL_BYTES: Final = 24 << 30
PASSES: Final = 5

WAYS: Final = (
    "flat", "two_level", "fasttree_rule", "pat_rule",
    "torch_sdpa", "flashinfer_decode", "flashinfer_cascade",
)  # fmt: skip
"""Of attending a cell otherwise: a column each, empty where a package is not there."""

Pass = Callable[[], None]
"""Queues the attention of one step, in all layers of a cell."""


@dataclass(frozen=True)
class DeviceCell:
    """A tree at one shape of heads, in a device's memory."""

    tree: Tree
    heads: Heads
    slots: list[list[int]]
    lengths: list[int]
    layers: list[LayerKV]
    step: BatchGeometry
    q: torch.Tensor

    @property
    def page_bytes(self) -> int:
        """Return the bytes of one page of one layer."""
        return self.heads.kv * self.layers[0].unit_bytes


def cell_of(
    tree: Tree, heads: Heads, dtype: torch.dtype, device: torch.device, pool_bytes: int
) -> DeviceCell | None:
    """Return a cell of random numbers, or None where it does not fit the pool."""
    laid = laid_out(tree)
    layout = ROW_LAYOUTS[dtype]
    tile_bytes = float_tile_bytes(layout, heads.dim)
    layer_bytes = laid.pages * heads.kv * tile_bytes
    if layer_bytes > pool_bytes:
        return None
    count = min(MOST_LAYERS, pool_bytes // layer_bytes, 1 + COLD_BYTES // layer_bytes)
    rng = np.random.default_rng(0)
    tiles = laid.pages * heads.kv
    layers = []
    for _ in range(count):
        numbers = torch.randn(layer_bytes // dtype.itemsize, dtype=dtype, device=device)
        table = rng.permutation(tiles).astype(np.int32).reshape(laid.pages, 1, heads.kv)
        there = torch.from_numpy(table).to(device)
        layers.append(
            LayerKV(numbers.view(torch.uint8), table, tile_bytes, 0, heads.kv, heads.dim, there)
        )
    asked = [Asked(s, n) for s, n in zip(laid.slots, laid.lengths, strict=True)]
    q = torch.randn(len(asked), heads.q, heads.dim, dtype=dtype, device=device)
    step = geometry(asked, layout)
    return DeviceCell(tree, heads, laid.slots, laid.lengths, layers, step, q)


def ours(cell: DeviceCell, plan: AttentionPlan, *, decode: bool = False) -> Pass:
    """Return a pass of our kernels; each layer has its own table, and so its own attention.

    `decode`: codes are widened to floats first.
    """
    attentions = [(TritonAttention(cell.q.device, decode=decode), kv) for kv in cell.layers]

    def once() -> None:
        for attention, kv in attentions:
            attention.attend(cell.q, kv, plan)

    return once


def sdpa(cell: DeviceCell) -> Pass:
    """Return a pass of torch's attention, request by request."""
    heads = cell.heads
    shape = (heads.kv, max(cell.lengths), heads.dim)
    k, v = (torch.randn(shape, dtype=cell.q.dtype, device=cell.q.device) for _ in range(2))

    def once() -> None:
        for _ in cell.layers:
            for i, length in enumerate(cell.lengths):
                torch.nn.functional.scaled_dot_product_attention(
                    cell.q[i][None, :, None], k[None, :, :length], v[None, :, :length],
                    enable_gqa=True,
                )  # fmt: skip

    return once


def seconds(once: Pass, device: torch.device) -> float:
    """Return what one pass takes, several being queued."""
    if device.type != "cuda":
        begun = time.perf_counter()
        once()
        return time.perf_counter() - begun
    once()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(PASSES):
        once()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / PASSES


def peers_of(cell: DeviceCell) -> dict[str, Pass]:
    """Return what else attends on this machine, by name."""
    found = {"torch_sdpa": sdpa(cell)}
    if importlib.util.find_spec("flashinfer") is not None:
        from bench.attention_flashinfer import cascade, decode  # noqa: PLC0415

        found["flashinfer_decode"] = decode(cell)
        if len(cell.tree.nodes) == 2 and cell.tree.nodes[0] == 1:
            found["flashinfer_cascade"] = cascade(cell)
    return found


@dataclass(frozen=True)
class Found:
    """A cell's row and what its figures need."""

    row: Row
    gain: Estimate
    over_flashinfer: Estimate | None
    over_cascade: Estimate | None


def costs_of(cell: DeviceCell) -> CostModel:
    """Return the costs an engine of these heads would start with."""
    device, kv, layout = cell.q.device, cell.layers[0], ROW_LAYOUTS[cell.q.dtype]
    if device.type != "cuda":
        return DEVICE_SEED
    attention, programs = TritonAttention(device), programs_of(device)
    return profile(Bench(attention, kv, layout, layout, cell.heads.q, programs, on_device(device)))


def measure_cell(cell: DeviceCell, costs: CostModel, pairs: int) -> Found:
    """Measure all ways of attending a cell in turn, `pairs` times."""
    device, step = cell.q.device, cell.step
    group = cell.heads.q // cell.heads.kv
    flat, tree = FlatPlanner().plan(step), TreePlanner(costs, group).plan(step)
    plans = {
        "flat": flat,
        "tree": tree,
        "two_level": two_level(step),
        "fasttree_rule": by_rule(step, fasttree(group)),
        "pat_rule": by_rule(step, pat(group)),
    }
    passes = {name: ours(cell, plan) for name, plan in plans.items()} | peers_of(cell)
    times = {name: np.zeros(pairs) for name in passes}
    for i in range(pairs):
        for name, once in passes.items():
            times[name][i] = seconds(once, device)
    pages, every = int(tree.runs[:, 1].sum()), flat_pages(cell.slots)
    tree_s = float(np.median(times["tree"]))
    read_bytes = pages * cell.page_bytes * len(cell.layers)
    gains = {name: estimate_of((found / times["tree"]).tolist()) for name, found in times.items()}
    row: dict[str, Cell] = {
        "tree": cell.tree.name,
        "heads": f"{cell.heads.q}/{cell.heads.kv}x{cell.heads.dim}",
        "requests": len(cell.lengths),
        "byte_ratio": every / pages,
        "tree_us": tree_s * 1e6 / len(cell.layers),
        "tree_gb_s": read_bytes / tree_s / 1e9,
        "planned_as_tree": tree.parents is not None,
    }
    for name in WAYS:
        row[f"over_{name}"] = gains[name].median if name in gains else None
    return Found(
        row, gains["flat"], gains.get("flashinfer_decode"), gains.get("flashinfer_cascade")
    )


def grid(*, quick: bool) -> list[tuple[Tree, Heads]]:
    """Return the cells: CoDec's sweeps at its heads, the other trees at all of ours."""
    sweeps = codec(CODEC_TOKENS)
    if quick:
        return [(tree, HEADS[0]) for tree in (sweeps[0], sweeps[9], FASTTREE[8], PAT[0])]
    cells = [(tree, HEADS[0]) for tree in sweeps]
    return cells + [(tree, heads) for heads in HEADS for tree in (*FASTTREE, *PAT, *UNSHARED)]


def figures_of(found: Sequence[Found]) -> list[Figure]:
    """Return the grid's mean and largest gain, and the lowest over the cascade."""
    decode = [one.over_flashinfer for one in found if one.over_flashinfer is not None]
    name = "gpu_gain_over_flashinfer" if decode else "gpu_gain_over_flat"
    gains = decode or [one.gain for one in found]
    median, low, high = np.mean([(e.median, e.low, e.high) for e in gains], axis=0).tolist()
    best = max(gains, key=lambda e: e.median)
    figures = [
        Figure(f"{name}_mean", Estimate(median, low, high, best.samples), Goal(">=", 2.2)),
        Figure(f"{name}_max", best, Goal(">=", 3.6)),
    ]
    cascades = [one.over_cascade for one in found if one.over_cascade is not None]
    if cascades:
        worst = min(cascades, key=lambda e: e.median)
        figures.append(Figure("gpu_over_cascade_min", worst, Goal(">=", 1.0)))
    return figures


def measure(options: Options) -> Report:
    """Measure the grid on the first CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError("bench: attention_gpu needs a CUDA device; use attention on a CPU")
    device = torch.device("cuda")
    pairs = 3 if options.quick else MIN_PAIRS
    found = []
    costs: dict[Heads, CostModel] = {}
    for tree, heads in grid(quick=options.quick):
        cell = cell_of(tree, heads, torch.bfloat16, device, POOL_BYTES)
        if cell is not None:
            if heads not in costs:
                costs[heads] = costs_of(cell)
            found.append(measure_cell(cell, costs[heads], pairs))
    params: dict[str, Cell] = {
        "device": torch.cuda.get_device_name(device),
        "quick": options.quick,
        "dtype": "bfloat16",
        "page_tokens": PAGE_TOKENS,
        "codec_tokens": CODEC_TOKENS,
        "costs": "; ".join(f"{heads}: {model}" for heads, model in costs.items()),
    }
    return Report("attention_gpu", params, figures_of(found), [one.row for one in found])


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("attention_gpu", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
