"""Steps whose requests hold pages in common, over a pool in which every page is filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvkeep.attention.cost import CostModel
from kvkeep.attention.planner import TreePlanner
from kvkeep.ops.layout import AttentionOps, AttentionPlan, chains
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Int32Array, Layout, PageTag, Segment, View
from tests.oracles import Heads, World, make_world

ALWAYS = CostModel(c0=0.0, a_mem=1e6, a_row=0.0)
"""Reading is all that costs: whatever can be shared is."""


def eager(group: int, *, across_scopes: bool = True) -> TreePlanner:
    """Return a planner that shares every node of at least 256 tokens."""
    return TreePlanner(ALWAYS, group, across_scopes=across_scopes)


@dataclass
class Filled:
    """A pool and what its pages hold: k, v [pages, S, Hkv, D]."""

    world: World
    k: torch.Tensor
    v: torch.Tensor

    @property
    def heads(self) -> Heads:
        return self.world.heads

    def queries(self, rows: int) -> torch.Tensor:
        return self.world.tensor(rows, self.heads.q, self.heads.dim)

    def tokens(self, slots: Int32Array, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `count` tokens of pages in order, k and v [n, Hkv, D]."""
        shape = (-1, self.heads.kv, self.heads.dim)
        pages = torch.from_numpy(slots.astype(np.int64))
        return self.k[pages].reshape(shape)[:count], self.v[pages].reshape(shape)[:count]


def filled(
    ops: AttentionOps,
    heads: Heads,
    layout: Layout,
    pages: int,
    seed: int = 0,
    *,
    device: str = "cpu",
) -> Filled:
    """Return a pool of `pages` pages, all of them written."""
    world = make_world(heads, layout, pages=pages, seed=seed, device=device)
    request = world.add(ops, pages * PAGE_TOKENS)
    shape = (pages, PAGE_TOKENS, heads.kv, heads.dim)
    k, v = torch.empty(shape, dtype=request.k.dtype), torch.empty(shape, dtype=request.v.dtype)
    at = torch.from_numpy(request.slots.astype(np.int64))
    k[at], v[at] = request.k.view(shape), request.v.view(shape)
    return Filled(world, k, v)


@dataclass(frozen=True)
class Asked:
    """One request of a step: the pages it holds, its tokens, and how many of them are new."""

    slots: Sequence[int]
    length: int
    rows: int = 1
    scope: str = "s"


def geometry(asked: Sequence[Asked], layout: Layout) -> BatchGeometry:
    """Return the step of these requests."""
    segments, row = [], 0
    for number, one in enumerate(asked):
        slots = np.array(one.slots, np.int32)
        assert len(slots) >= -(-one.length // PAGE_TOKENS)
        view = View(number, PageTag(one.scope), slots, len(slots), one.length)
        first = one.length - one.rows
        segments.append(Segment(view, row, one.rows, first, slots, 0))
        row += one.rows
    return BatchGeometry(tuple(segments), row, layout, layout)


def covers(plan: AttentionPlan, step: BatchGeometry) -> bool:
    """Tell whether every row sees exactly its own pages, each once and at its own position."""
    wanted = {}
    for segment in step.segments:
        for i in range(segment.num_rows):
            row, count = segment.first_row + i, segment.first_position + i + 1
            slots = segment.view.slots[: -(-count // PAGE_TOKENS)].tolist()
            wanted[row] = {n * PAGE_TOKENS: slot for n, slot in enumerate(slots)}
    seen = 0
    for rows, runs in chains(plan):
        pages: dict[int, int] = {}
        for run in runs:
            for i in range(run.page_count):
                at = run.first_position + i * PAGE_TOKENS
                if at in pages:
                    return False
                pages[at] = int(plan.pages[run.page_begin + i])
        for row in rows:
            seen += 1
            position = int(plan.row_positions[row])
            if {at: slot for at, slot in pages.items() if at <= position} != wanted.get(row):
                return False
    return seen == step.num_rows
