"""A cell of the attention benchmark: one tree, its memory, and every way of attending to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from bench.attention_grids import Layout, Tree, laid_out
from bench.memory import huge
from kvkeep.attention.chains import chains_of
from kvkeep.attention.contraction import contract
from kvkeep.attention.edges import Leaves, without_edges
from kvkeep.attention.planner import CACHED_BYTES, TreePlanner, plan_of, row_bounds
from kvkeep.attention.profile import Bench, profile
from kvkeep.attention.tree import build_forest
from kvkeep.ops.cpu import DotPeak, ReadBandwidth, available, cpu_ops
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import AttentionPlan, LayerKV, float_tile_bytes
from kvkeep.types import BatchGeometry
from kvkeep.types import Layout as TileLayout
from tests.forests import Asked, geometry
from tests.oracles import Heads

POOL_BYTES: Final = 3 << 29
MOST_LAYERS: Final = 4


class Machine:
    """Kernels, one pool of random numbers for every cell, and the machine's ceilings."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.kernel = available()[0]
        ops = cpu_ops(self.kernel, threads).attention
        if not isinstance(ops, CpuAttention):
            raise TypeError("this benchmark measures the native kernels")
        self.ops = ops
        torch.set_num_threads(threads)
        sample = torch.randn(1 << 22).to(torch.bfloat16)
        self.buffer = huge(POOL_BYTES)
        numbers = self.buffer.view(torch.bfloat16)
        for begin in range(0, numbers.numel(), sample.numel()):
            part = numbers[begin : begin + sample.numel()]
            part.copy_(sample[: part.numel()])
        self.reader = ReadBandwidth(threads)
        self.peak = DotPeak(self.kernel, threads)

    def layers(self, heads: Heads, pages: int) -> list[LayerKV] | None:
        """Return layers of `pages` pages that together leave the caches; None: too large."""
        tile_bytes = float_tile_bytes(TileLayout.BF16, heads.dim)
        layer_bytes = pages * heads.kv * tile_bytes
        fit = POOL_BYTES // layer_bytes
        if fit < 1:
            return None
        count = min(fit, MOST_LAYERS)
        rng = np.random.default_rng(0)
        tiles = pages * heads.kv
        layers = []
        for layer in range(count):
            table = (rng.permutation(tiles) + layer * tiles).astype(np.int32)
            table = table.reshape(pages, 1, heads.kv)
            layers.append(LayerKV(self.buffer, table, tile_bytes, 0, heads.kv, heads.dim))
        return layers


def planner_for(machine: Machine, heads: Heads) -> TreePlanner:
    """Return the planner an engine of these heads would start with."""
    layers = machine.layers(heads, 64)
    assert layers is not None
    bench = Bench(
        machine.ops, layers[0], TileLayout.BF16, TileLayout.BF16, heads.q, machine.threads
    )
    token_bytes = 2 * heads.kv * heads.dim * 2
    return TreePlanner(
        profile(bench), heads.q // heads.kv, cached_tokens=CACHED_BYTES // token_bytes
    )


@dataclass(frozen=True)
class CellOf:
    """One tree at one shape of heads."""

    tree: Tree
    heads: Heads
    layout: Layout
    layers: list[LayerKV]
    step: BatchGeometry
    q: torch.Tensor

    @property
    def layer_bytes(self) -> int:
        """Return the bytes of K and V of one layer's distinct pages."""
        return self.layout.pages * self.page_bytes

    @property
    def page_bytes(self) -> int:
        """Return the bytes of one page of one layer."""
        return self.heads.kv * self.layers[0].unit_bytes


def cell_of(machine: Machine, tree: Tree, heads: Heads) -> CellOf | None:
    """Return a cell, or None where it does not fit the pool."""
    layout = laid_out(tree)
    layers = machine.layers(heads, layout.pages)
    if layers is None:
        return None
    asked = [Asked(s, n) for s, n in zip(layout.slots, layout.lengths, strict=True)]
    step = geometry(asked, TileLayout.BF16)
    q = torch.randn(len(asked), heads.q, heads.dim).to(torch.bfloat16)
    return CellOf(tree, heads, layout, layers, step, q)


def attend_all(machine: Machine, cell: CellOf, plan: AttentionPlan) -> float:
    """Return the seconds of one pass over the layers."""
    begun = time.perf_counter()
    for kv in cell.layers:
        machine.ops.attend(cell.q, kv, plan)
    return time.perf_counter() - begun


def head_outer(machine: Machine, cell: CellOf, plan: AttentionPlan) -> Callable[[], float]:
    """Return a pass that takes the heads in turn: all requests of one, then of the next."""
    heads, group = cell.heads, cell.heads.q // cell.heads.kv
    queries = [cell.q[:, h * group : (h + 1) * group].contiguous() for h in range(heads.kv)]
    tables = [
        [
            replace(
                kv, tile_table=np.ascontiguousarray(kv.tile_table[:, :, h : h + 1]), num_kv_heads=1
            )
            for h in range(heads.kv)
        ]
        for kv in cell.layers
    ]

    def once() -> float:
        begun = time.perf_counter()
        for layer in tables:
            for q, kv in zip(queries, layer, strict=True):
                machine.ops.attend(q, kv, plan)
        return time.perf_counter() - begun

    return once


def sdpa(cell: CellOf) -> Callable[[], float]:
    """Return a pass of torch's attention, request by request, over K and V that lie contiguous."""
    heads = cell.heads
    group = heads.q // heads.kv
    most = max(cell.layout.lengths)
    k = torch.randn(heads.kv, most, heads.dim).to(torch.bfloat16)
    v = torch.randn(heads.kv, most, heads.dim).to(torch.bfloat16)
    copies = [(k.clone(), v.clone()) for _ in range(min(len(cell.layout.lengths), 8))]
    q = cell.q.view(-1, heads.kv, group, heads.dim)

    def once() -> float:
        begun = time.perf_counter()
        for i, length in enumerate(cell.layout.lengths):
            keys, values = copies[i % len(copies)]
            torch.nn.functional.scaled_dot_product_attention(
                q[i : i + 1].reshape(1, heads.q, 1, heads.dim),
                keys[None, :, :length],
                values[None, :, :length],
                enable_gqa=True,
            )
        return (time.perf_counter() - begun) * len(cell.layers)

    return once


def two_level(step: BatchGeometry) -> AttentionPlan:
    """Return the plan that shares root nodes alone."""
    chains = chains_of(step)
    forest = build_forest(chains)
    bounds = row_bounds(chains, forest.order)
    kept = contract(forest, bounds, lambda node, _children, _bounds: node.begin == 0)
    return plan_of(step, chains, kept)


def by_rule(step: BatchGeometry, leaves: Leaves) -> AttentionPlan:
    """Return the plan of a published rule, which knows nothing of this machine."""
    chains = chains_of(step)
    return plan_of(step, chains, without_edges(build_forest(chains), chains, leaves))


def ceiling_s(cell: CellOf, pages: int, gb_s: float, gflop_s: float) -> float:
    """Return the roof of one pass that reads `pages` pages per layer: memory's or arithmetic's."""
    flops = 4.0 * cell.heads.dim * cell.heads.q * sum(cell.layout.lengths)
    reading = pages * cell.page_bytes / (gb_s * 1e9)
    return max(reading, flops / (gflop_s * 1e9)) * len(cell.layers)
