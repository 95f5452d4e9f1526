"""Measure the kernels of this machine for the cost model, at start: 50 to 80 ms a layout.

A device's calls are queued: several are timed together, each with work enough to hide what the
host takes to launch it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import torch

from kvkeep.attention.cost import (
    DEVICE_SEED,
    SEED,
    CostModel,
    Sample,
    believable,
    fit,
    merge_cost,
    scaled,
)
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.layout import STEP_TOKENS, TORCH_DTYPE, AttentionOps, AttentionPlan, LayerKV
from kvkeep.types import PAGE_TOKENS, Layout

BUDGET_S = 0.05
_PAGES = 16
"""Of a measured item: 1,024 tokens."""

_STEP_PAGES = STEP_TOKENS // PAGE_TOKENS
_CUTS = 4
"""Nodes that a chain is cut into where merging is measured."""

_MANY_ROWS = 48
_LEAST_TURNS = 5


class _Shape(NamedTuple):
    """What the items of one call have in common."""

    queries: int
    pages: int
    fresh: bool = False
    """From memory."""
    nodes: int = 1
    """Groups that the pages are cut into, each going on from the one before."""


_POINTS = (_Shape(1, 1), _Shape(1, _PAGES, fresh=True), _Shape(2, _PAGES), _Shape(12, _PAGES))


@dataclass(frozen=True, slots=True)
class Timing:
    """How a machine's kernels are timed."""

    seed: CostModel
    """Where nothing can be measured."""
    cold_bytes: int
    """Read once, these are not in a last-level cache the next time."""
    wait: Callable[[], object] | None = None
    """Returns once all that is queued is done; None: a call returns when it is done."""
    calls: int = 1
    """Queued between two readings of the clock."""
    least_pages: int = 0
    """That a thread or program visits in a call."""
    now: Callable[[], float] = time.perf_counter


ON_CPU: Final = Timing(SEED, 64 << 20)


def on_device(device: torch.device) -> Timing:
    """Return how a CUDA device is timed."""
    wait = partial(torch.cuda.synchronize, device)
    return Timing(DEVICE_SEED, 256 << 20, wait, calls=4, least_pages=64)


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured: one layer's tiles of a pool that nothing uses yet."""

    ops: AttentionOps
    kv: LayerKV
    layout: Layout
    """Of the model's dtype."""
    stored: Layout
    """Of the tiles that are attended: the same, or a codec's."""
    num_heads: int
    threads: int
    """Or programs that a device runs at once."""
    timing: Timing = ON_CPU

    @property
    def pages(self) -> int:
        """Return how many pages of one layer the tiles make."""
        return self.kv.buffer.numel() // (self._tile_bytes * self.kv.num_kv_heads)

    @property
    def group(self) -> int:
        """Return G."""
        return self.num_heads // self.kv.num_kv_heads

    @property
    def _tile_bytes(self) -> int:
        return tile_bytes(self.stored, self.kv.head_dim)

    def sample(self, queries: int, pages: int, *, fresh: bool) -> Sample:
        """Return the time of one item: `queries` queries of one KV head over `pages` pages.

        The fastest of several: a machine that is busy while an engine starts only adds to it.
        """
        once = self._timed(_Shape(queries, pages, fresh))
        times: list[float] = []
        now, begun = self.timing.now, self.timing.now()
        while len(times) < 3 or now() - begun < BUDGET_S / len(_POINTS) / 2:
            times.append(once())
        return Sample(queries * self.group, pages * PAGE_TOKENS, fresh, min(times))

    def merging(self) -> tuple[float, float]:
        """Return what a row of one more group costs, in nanoseconds, and how unsure that is.

        A chain is attended whole and cut, by many rows and by few, in turn: what starting a group
        costs is in both and falls out. What disturbs a call only makes it longer, so the fastest
        of each way count; the next fastest tell how sure they are.
        """
        queries = (max(2, _MANY_ROWS // self.group), 1)
        pages = _CUTS * _STEP_PAGES
        ways = [
            self._timed(_Shape(count, pages, nodes=nodes))
            for count in queries
            for nodes in (_CUTS, 1)
        ]
        turns: list[list[float]] = []
        now, begun = self.timing.now, self.timing.now()
        while len(turns) < _LEAST_TURNS or now() - begun < BUDGET_S / 5:
            turns.append([once() for once in ways])
        (many, whole, few, few_whole), second = np.sort(np.array(turns), axis=0)[:2]
        rows = (_CUTS - 1) * (queries[0] - queries[1]) * self.group
        error = float((second - (many, whole, few, few_whole)).sum())
        return float(many - whole - (few - few_whole)) / rows, error / rows

    def _timed(self, shape: _Shape) -> Callable[[], float]:
        """Return a call of enough such items to busy all threads: it returns nanoseconds an item.

        It has run once.
        """
        heads, timing = self.kv.num_kv_heads, self.timing
        wanted = timing.cold_bytes // (self._tile_bytes * heads) if shape.fresh else shape.pages
        distinct = min(max(wanted, shape.pages), self.pages) // shape.pages
        each = max(4, timing.least_pages // shape.pages)
        chains = max(distinct, -(-each * self.threads // heads))
        units = self._tile_bytes // self.kv.unit_bytes
        table = _table(distinct * shape.pages, heads) * np.int32(units)
        kv = replace(self.kv, tile_table=table, layer=0, device_table=None)
        plan = _plan(chains, shape, distinct, self.stored)
        size = (chains * shape.queries, self.num_heads, self.kv.head_dim)
        q = torch.zeros(size, dtype=TORCH_DTYPE[self.layout], device=self.kv.buffer.device)
        items = timing.calls * chains * heads / self.threads

        def once() -> float:
            at = timing.now()
            for _ in range(timing.calls):
                self.ops.attend(q, kv, plan)
            if timing.wait is not None:
                timing.wait()
            return (timing.now() - at) / items * 1e9

        once()
        return once


def profile(bench: Bench) -> CostModel:
    """Return the cost model of this machine's kernels.

    The seed where the pool is too small, or where a device's figures are none that a device has.
    """
    seed = bench.timing.seed
    if bench.pages < _PAGES:
        return seed
    model = fit([bench.sample(p.queries, p.pages, fresh=p.fresh) for p in _POINTS])
    if seed is DEVICE_SEED:
        if not believable(model, seed):
            return seed
        seed = scaled(seed, model.a_mem)
    return replace(model, a_merge=merge_cost(*bench.merging(), seed.a_merge))


def profile_all(benches: Sequence[Bench]) -> tuple[CostModel, ...]:
    """Return the cost models of several layouts of tiles, all in one unit.

    A seed is in none: where one layout can't be measured, none is.
    """
    models = tuple(profile(bench) for bench in benches)
    seeds = [m for m, bench in zip(models, benches, strict=True) if m is bench.timing.seed]
    return (seeds[0],) * len(models) if seeds else models


def _table(pages: int, heads: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.int32]]:
    table: np.ndarray[tuple[int, int, int], np.dtype[np.int32]] = np.arange(
        pages * heads, dtype=np.int32
    ).reshape(pages, 1, heads)
    return table


def _plan(chains: int, shape: _Shape, distinct: int, stored: Layout) -> AttentionPlan:
    """Return `chains` chains of `shape.nodes` groups over `distinct` chains' pages."""
    chain = np.repeat(np.arange(chains, dtype=np.int32), shape.nodes)
    node = np.tile(np.arange(shape.nodes, dtype=np.int32), chains)
    group = np.arange(chains * shape.nodes, dtype=np.int32)
    part = shape.pages // shape.nodes
    run = np.zeros((len(group), 4), np.int32)
    run[:, 0] = chain % distinct * shape.pages + node * part
    run[:, 1] = part
    run[:, 2] = node * part * PAGE_TOKENS
    run[:, 3] = int(stored)
    queries = chain * shape.queries
    return AttentionPlan(
        row_positions=np.full(chains * shape.queries, shape.pages * PAGE_TOKENS - 1, np.int32),
        groups=np.stack([queries, queries + shape.queries, group, group + 1], axis=1),
        runs=run,
        pages=np.arange(distinct * shape.pages, dtype=np.int32),
        parents=np.where(node > 0, group - 1, -1).astype(np.int32) if shape.nodes > 1 else None,
    )
