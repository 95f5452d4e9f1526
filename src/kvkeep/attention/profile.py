"""Measure the kernels of this machine for the cost model: about 50 ms at start."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvkeep.attention.cost import SEED, CostModel, Sample, fit
from kvkeep.ops.layout import (
    TORCH_DTYPE,
    AttentionOps,
    AttentionPlan,
    LayerKV,
    float_tile_bytes,
)
from kvkeep.types import PAGE_TOKENS, Layout

BUDGET_S = 0.05
_PAGES = 16
"""Of a measured item: 1,024 tokens."""

_COLD_BYTES = 96 << 20
"""Read once, these are not in a last-level cache the next time."""

_POINTS = ((1, 1, False), (1, _PAGES, True), (2, _PAGES, False), (12, _PAGES, False))
"""Queries, pages, and whether they come from memory."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured: one layer's tiles of a pool that nothing uses yet."""

    ops: AttentionOps
    kv: LayerKV
    layout: Layout
    num_heads: int
    threads: int

    @property
    def pages(self) -> int:
        """Return how many pages of one layer the tiles make."""
        return self.kv.buffer.numel() // (self._tile_bytes * self.kv.num_kv_heads)

    @property
    def _tile_bytes(self) -> int:
        return float_tile_bytes(self.layout, self.kv.head_dim)

    def sample(self, queries: int, pages: int, *, fresh: bool) -> Sample:
        """Return the time of one item: `queries` queries of one KV head over `pages` pages."""
        heads = self.kv.num_kv_heads
        wanted = _COLD_BYTES // (self._tile_bytes * heads) if fresh else pages
        distinct = min(max(wanted, pages), self.pages) // pages
        groups = max(distinct, -(-4 * self.threads // heads))
        units = self._tile_bytes // self.kv.unit_bytes
        table = _table(distinct * pages, heads) * np.int32(units)
        kv = replace(self.kv, tile_table=table, layer=0)
        plan = _plan(groups, queries, pages, distinct, self.layout)
        q = torch.zeros(
            (groups * queries, self.num_heads, self.kv.head_dim), dtype=TORCH_DTYPE[self.layout]
        )
        self.ops.attend(q, kv, plan)
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begun < BUDGET_S / len(_POINTS) / 2:
            at = time.perf_counter()
            self.ops.attend(q, kv, plan)
            times.append(time.perf_counter() - at)
        items = groups * heads / self.threads
        rows = queries * (self.num_heads // heads)
        return Sample(rows, pages * PAGE_TOKENS, fresh, float(np.median(times)) / items * 1e9)


def profile(bench: Bench) -> CostModel:
    """Return the cost model of this machine's kernels; the seed where the pool is too small."""
    if bench.pages < _PAGES:
        return SEED
    return fit([bench.sample(queries, pages, fresh=fresh) for queries, pages, fresh in _POINTS])


def _table(pages: int, heads: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.int32]]:
    table: np.ndarray[tuple[int, int, int], np.dtype[np.int32]] = np.arange(
        pages * heads, dtype=np.int32
    ).reshape(pages, 1, heads)
    return table


def _plan(groups: int, queries: int, pages: int, distinct: int, layout: Layout) -> AttentionPlan:
    begin = np.arange(groups, dtype=np.int32)
    run = np.zeros((groups, 4), np.int32)
    run[:, 0] = begin % distinct * pages
    run[:, 1] = pages
    run[:, 3] = int(layout)
    return AttentionPlan(
        row_positions=np.full(groups * queries, pages * PAGE_TOKENS - 1, np.int32),
        groups=np.stack([begin * queries, (begin + 1) * queries, begin, begin + 1], axis=1),
        runs=run,
        pages=np.arange(distinct * pages, dtype=np.int32),
    )
