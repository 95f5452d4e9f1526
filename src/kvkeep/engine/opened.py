"""What a step reads: the pool's tiles as they are, or opened a layer at a time while it attends.

Where tiles are sealed, those that a layer's plan names are opened into the pool's scratch, and a
table of the step's own names them there. Where they are more than it holds, requests are attended
one after the other: a row's bits depend on nothing but its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.cache.pool import TilePool
from kvkeep.cache.sealed import SealedTiles
from kvkeep.ops.layout import Attended, AttentionOps, AttentionPlan, LayerKV, Observe, Run, chains
from kvkeep.types import Int32Array, View

Int64Array = NDArray[np.int64]
Rows = Int64Array


class Readable(Protocol):
    """The tiles that one step attends to."""

    layers: Sequence[LayerKV]
    """Where its rows are appended."""
    changed: frozenset[int]
    """Tiles found changed so far."""

    def attend(self, q: torch.Tensor, layer: int, observe: Observe | None) -> Attended:
        """Attend q [T, Hq, D] to a layer."""

    def close(self) -> None:
        """Zero what was opened."""


class Opener:
    """Makes what steps read of one pool."""

    def __init__(self, pool: TilePool, ops: AttentionOps) -> None:
        self._pool = pool
        self._ops = ops
        self._layers = [pool.layer_kv(i) for i in range(pool.spec.num_layers)]
        self._layer_bytes = pool.open_bytes()
        self._table = pool.tile_table
        if pool.sealed is not None:
            self._table = np.full_like(pool.tile_table, -1)
            self._layers = [replace(kv, tile_table=self._table) for kv in self._layers]

    def open(self, plan: AttentionPlan) -> Readable:
        """Return what a step with this plan reads."""
        if self._pool.sealed is None:
            return AsTheyAre(self._ops, self._layers, plan)
        slots = np.unique(plan.pages[plan.pages >= 0])
        self._table[slots] = self._pool.tile_table[slots]
        return OpenedTiles(
            self._ops, self._layers, plan, self._pool, self._pool.sealed, self._layer_bytes
        )

    def tiles_of(self, view: View) -> Int32Array:
        """Return the tiles of a view's pages and of its own."""
        pages = self._pool.tile_table[view.pages()].reshape(-1)
        own = [] if view.packed is None else [view.packed.tiles.reshape(-1)]
        return np.concatenate([pages, *own])


class AsTheyAre:
    """Tiles that are never sealed."""

    changed: frozenset[int] = frozenset()

    def __init__(self, ops: AttentionOps, layers: Sequence[LayerKV], plan: AttentionPlan) -> None:
        self.layers = layers
        self._ops = ops
        self._plan = plan

    def attend(self, q: torch.Tensor, layer: int, observe: Observe | None) -> Attended:
        """Attend to the pool."""
        return self._ops.attend(q, self.layers[layer], self._plan, observe)

    def close(self) -> None:
        """Leave everything as it is."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows that are attended in one call."""

    plan: AttentionPlan
    rows: Rows | None
    """Which of the step's they are; None: all."""
    slots: Int32Array
    private: Int32Array
    """Rows of the plan's private tiles."""


class OpenedTiles:
    """Tiles that are opened a layer at a time."""

    def __init__(
        self,
        ops: AttentionOps,
        layers: Sequence[LayerKV],
        plan: AttentionPlan,
        pool: TilePool,
        tiles: SealedTiles,
        layer_bytes: Int64Array,
    ) -> None:
        """`layer_bytes`: of each page slot, see `TilePool.open_bytes`."""
        self.layers = layers
        self.changed: frozenset[int] = frozenset()
        self._ops = ops
        self._pool = pool
        self._tiles = tiles
        self._own = plan.private_tiles
        if plan.private_tiles is not None:
            plan = replace(plan, private_tiles=np.ascontiguousarray(plan.private_tiles).copy())
        self._plan = plan
        self._slices = _slices(plan, tiles.scratch_bytes, layer_bytes)

    def attend(self, q: torch.Tensor, layer: int, observe: Observe | None) -> Attended:
        """Open what the layer's rows see, and attend to it."""
        parts: list[tuple[Rows, Attended]] = []
        for one in self._slices:
            self._open(one, layer)
            if one.rows is None:
                return self._ops.attend(q, self.layers[layer], one.plan, observe)
            seen = observe
            if observe is not None:
                seen = Observe(observe.log2_thresholds[one.rows], observe.stamps)
            rows = torch.from_numpy(one.rows)
            parts.append((one.rows, self._ops.attend(q[rows], self.layers[layer], one.plan, seen)))
        return _joined(parts, len(q))

    def close(self) -> None:
        """Zero the scratch."""
        self._tiles.close()

    def _open(self, one: _Slice, layer: int) -> None:
        """Open a slice's tiles of a layer and name them in the step's table."""
        table, heads = self._pool.tile_table, self._pool.spec.num_kv_heads
        ids = table[one.slots, layer].reshape(-1)
        own = self._plan.private_tiles
        if self._own is not None:
            ids = np.concatenate([ids, self._own[one.private, layer].reshape(-1)])
        opened, changed, _ = self._tiles.open(ids, 0)
        if changed.any():
            self.changed |= frozenset(ids[changed].tolist())
        places = len(one.slots) * heads
        self.layers[layer].tile_table[one.slots, layer] = opened[:places].reshape(-1, heads)
        if own is not None:
            own[one.private, layer] = opened[places:].reshape(-1, heads)


def _slices(plan: AttentionPlan, room_bytes: int, layer_bytes: Int64Array) -> list[_Slice]:
    """Return the whole plan, or parts of it whose pages are few enough to be open at a time."""
    own = int(layer_bytes.max())
    used = np.unique(plan.pages)
    if int(np.where(used >= 0, layer_bytes[used], own).sum()) <= room_bytes:
        return [_Slice(plan, None, used[used >= 0], -1 - used[used < 0])]
    found: list[_Slice] = []
    chosen: list[tuple[list[int], list[Run]]] = []
    seen: set[int] = set()
    taken = 0
    for rows, runs in chains(plan):
        pages = {
            page
            for run in runs
            for page in plan.pages[run.page_begin : run.page_begin + run.page_count].tolist()
        }
        needs = {page: int(layer_bytes[page]) if page >= 0 else own for page in pages}
        if chosen and taken + sum(needs[page] for page in pages - seen) > room_bytes:
            found.append(_slice_of(plan, chosen, seen))
            chosen, seen, taken = [], set(), 0
        chosen.append((rows, runs))
        taken += sum(needs[page] for page in pages - seen)
        seen |= pages
    return [*found, _slice_of(plan, chosen, seen)]


def _slice_of(
    plan: AttentionPlan, chosen: Sequence[tuple[list[int], list[Run]]], seen: set[int]
) -> _Slice:
    """Return some leaves of a plan as a flat plan of their rows."""
    rows = np.array([row for own, _ in chosen for row in own], np.int64)
    groups, row, run = [], 0, 0
    for own, runs in chosen:
        groups.append((row, row + len(own), run, run + len(runs)))
        row, run = row + len(own), run + len(runs)
    flat = replace(
        plan,
        row_positions=np.ascontiguousarray(plan.row_positions[rows]),
        groups=np.array(groups, np.int32),
        runs=np.array([one for _, runs in chosen for one in runs], np.int32).reshape(-1, 4),
        parents=None,
        row_order=None,
    )
    used = np.array(sorted(seen), np.int32)
    return _Slice(flat, rows, used[used >= 0], -1 - used[used < 0])


def _joined(parts: Sequence[tuple[Rows, Attended]], count: int) -> Attended:
    """Return the results of all rows from those of slices."""
    first = parts[0][1]
    out = first.out.new_empty((count, *first.out.shape[1:]))
    lse2 = first.lse2.new_empty((count, *first.lse2.shape[1:]))
    hits, stamps = first.hits, first.stamps
    for rows, part in parts:
        at = torch.from_numpy(rows)
        out[at], lse2[at] = part.out, part.lse2
        if hits is not None and part.hits is not None:
            hits = hits | part.hits
        if stamps is not None and part.stamps is not None:
            stamps = np.maximum(stamps, part.stamps)
    return Attended(out, lse2, hits, stamps)
