"""The attention seam: turn a step's geometry into one plan for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple, Protocol

import numpy as np

from kvkeep.attention.chains import Chain, chains_of
from kvkeep.attention.contraction import (
    GAIN,
    MIN_NODE_TOKENS,
    Costs,
    contract,
    ours,
    predicted_ns,
)
from kvkeep.attention.cost import CostModel
from kvkeep.attention.patch import with_moved
from kvkeep.attention.tree import Forest, Node, build_forest, flat_forest
from kvkeep.ops.layout import CARRIED, AttentionPlan
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Int32Array, UInt64Array, View

CACHED_BYTES = 8 << 20
"""Of a last-level cache: what one request's reading of a layer leaves to the next. Measured: of 32
MB, 16 were too many."""

_REPLAN_PAGES = 16
"""A forest is kept until a chain has grown by as many pages."""

_Shape = tuple[tuple[int, bool, int], ...]
"""Per chain: rows, whether it shares nothing, pages in units of `_REPLAN_PAGES`."""


_Pages = tuple[int, int] | None
"""A view's id and version: the pages a chain had, but for growth; None: nothing is known."""


class _Kept(NamedTuple):
    """A step's forest, and what it was made for."""

    shape: _Shape
    pages: tuple[_Pages, ...]
    """Of each chain."""
    forest: Forest


class AttentionPlanner(Protocol):
    """Decides, once per step, which rows read which pages together."""

    def plan(self, geometry: BatchGeometry) -> AttentionPlan:
        """Return a plan in which every row sees each of its tokens exactly once."""

    def forget(self, view: View) -> None:
        """Drop whatever is remembered of a view that ended."""


class FlatPlanner:
    """Every request reads its own pages: the baseline, and the oracle of any sharing planner."""

    def plan(self, geometry: BatchGeometry) -> AttentionPlan:
        """Return one group per request and per set of encoded pages its rows see."""
        chains = chains_of(geometry)
        return plan_of(geometry, chains, flat_forest(chains))

    def forget(self, view: View) -> None:
        """Nothing is remembered."""


class TreePlanner:
    """Requests that hold the same pages read them once, where that is predicted to be faster.

    The choice changes speed, never a bit of a result.
    """

    def __init__(
        self,
        model: CostModel,
        group: int,
        *,
        coded: CostModel | None = None,
        across_scopes: bool = True,
        cached_tokens: int = 0,
    ) -> None:
        """Plan by the costs of pages in the model's dtype and of a codec's; None: the same."""
        self._models = model, coded or model
        self._group = group
        self._across_scopes = across_scopes
        self._cached_tokens = cached_tokens
        self._last: _Kept | None = None

    def plan(self, geometry: BatchGeometry) -> AttentionPlan:
        """Return a tree's plan, or the flat one where sharing does not pay."""
        chains = chains_of(geometry)
        return plan_of(geometry, chains, self._forest(chains))

    def forget(self, view: View) -> None:
        """Take nothing for granted of a view's pages: should its number return, look at them."""
        if self._last is not None:
            kept = (None if one and one[0] == view.id else one for one in self._last.pages)
            self._last = self._last._replace(pages=tuple(kept))

    def _forest(self, chains: Sequence[Chain]) -> Forest:
        """Return the step's forest: the last one with longer leaves, where its pages only grew.

        Beams that were reordered, and views whose pages changed, are found again by their pages.
        """
        shape, pages = _shape_of(chains), tuple((c.view, c.version) for c in chains)
        forest, last = None, self._last
        if last is not None and last.shape == shape:
            if last.pages == pages:
                forest = _with_leaves(last.forest, chains)
            else:
                moved = {i for i, (a, b) in enumerate(zip(pages, last.pages)) if a != b}
                across = self._across_scopes
                forest = with_moved(last.forest, chains, moved, across_scopes=across)
        if forest is None:
            forest = self._fresh(chains)
        self._last = _Kept(shape, pages, forest)
        return forest

    def _fresh(self, chains: Sequence[Chain]) -> Forest:
        flat = flat_forest(chains)
        if not _may_share(chains, across_scopes=self._across_scopes):
            return flat
        shared = build_forest(chains, across_scopes=self._across_scopes)
        if len(shared.nodes) == len(chains):
            return flat
        bounds = row_bounds(chains, shared.order)
        costs = Costs(chains, shared.order, *self._models)
        kept = contract(shared, bounds, ours(costs.model_of, self._group, self._cached_tokens))
        tree = predicted_ns(kept, bounds, costs, self._group)
        apart = predicted_ns(
            flat,
            row_bounds(chains, flat.order),
            Costs(chains, flat.order, *self._models),
            self._group,
        )
        return kept if tree < GAIN * apart else flat


def _shape_of(chains: Sequence[Chain]) -> _Shape:
    return tuple((c.num_rows, c.shareable == 0, len(c.pages) // _REPLAN_PAGES) for c in chains)


def _may_share(chains: Sequence[Chain], *, across_scopes: bool) -> bool:
    """Tell whether any two chains begin with the same page and are long enough for a node."""
    seen: set[tuple[str, int]] = set()
    for held in chains:
        if held.shareable * PAGE_TOKENS >= MIN_NODE_TOKENS:
            start = ("" if across_scopes else held.scope, int(held.pages[0]))
            if start in seen:
                return True
            seen.add(start)
    return False


def _with_leaves(forest: Forest, chains: Sequence[Chain]) -> Forest | None:
    """Return the forest with leaves that end where their chains now do.

    None where a chain went back, so that its rows no longer see all of what it shared.
    """
    order = forest.order
    if len(forest.nodes) == len(order):
        return flat_forest(chains)
    nodes = list(forest.nodes)
    for index, (begin, _, parent, first, last) in enumerate(nodes):
        if last - first == 1:
            held = chains[order[first]]
            if held.shareable < begin:
                return None
            nodes[index] = Node(begin, len(held.pages), parent, first, last)
    return Forest(order, tuple(nodes))


def row_bounds(chains: Sequence[Chain], order: Sequence[int]) -> list[int]:
    """Return [places + 1] how many rows stand before each place."""
    return [0, *accumulate(chains[i].num_rows for i in order)]


def plan_of(geometry: BatchGeometry, chains: Sequence[Chain], forest: Forest) -> AttentionPlan:
    """Return the plan in which each node of the forest is a group."""
    bounds = row_bounds(chains, forest.order)
    groups: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int, int, int]] = []
    entries: list[Int32Array] = []
    masks: list[tuple[int, UInt64Array]] = []
    private: list[Int32Array] = []
    total = num_private = 0
    for node in forest.nodes:
        held = chains[forest.order[node.first]]
        run_begin = len(runs)
        for begin, end, layout in _cut_by_layout(node.begin, node.end, held, geometry):
            page = held.page_at(begin)
            at = total + begin - node.begin
            runs.append((at, end - begin, page * PAGE_TOKENS, layout))
        groups.append((bounds[node.first], bounds[node.last], run_begin, len(runs)))
        pages = held.pages[node.begin : node.end]
        if held.packed is not None:
            pages = np.where(pages < 0, pages - num_private, pages)
            private.append(held.packed.tiles)
            num_private += len(held.packed.tiles)
        entries.append(pages)
        if held.masks is not None:
            masks.append((total, held.masks))
        total += node.end - node.begin
    straight = forest.order == tuple(range(len(chains)))
    return AttentionPlan(
        row_positions=_positions(chains, geometry.num_rows),
        groups=np.array(groups, np.int32).reshape(-1, 4),
        runs=np.array(runs, np.int32).reshape(-1, 4),
        pages=np.concatenate(entries) if entries else np.zeros(0, np.int32),
        private_tiles=np.concatenate(private) if private else None,
        masks=_stack_masks(masks, total),
        parents=_parents(forest, chains),
        row_order=None if straight else _row_order(chains, forest.order),
    )


def _cut_by_layout(
    begin: int, end: int, held: Chain, geometry: BatchGeometry
) -> list[tuple[int, int, int]]:
    """Return pages [begin, end) as ranges of one layout each, cut where pages are missing."""
    if geometry.coded_layout == geometry.layout:
        coded_end = begin
    else:
        coded_end = max(begin, min(held.coded, end))
    coded, plain = int(geometry.coded_layout), int(geometry.layout)
    parts = [(begin, coded_end, coded), (coded_end, end, plain)]
    if held.packed is not None:
        at = len(held.packed.tiles) + 1
        parts = [
            cut
            for first, last, layout in parts
            for cut in ((first, min(last, at), layout), (max(first, at), last, layout))
        ]
    return [part for part in parts if part[1] > part[0]]


def _positions(chains: Sequence[Chain], rows: int) -> Int32Array:
    positions = np.empty(rows, np.int32)
    for c in chains:
        if c.num_rows == 1:
            positions[c.first_row] = c.first_position
        else:
            positions[c.first_row : c.first_row + c.num_rows] = np.arange(
                c.first_position, c.first_position + c.num_rows, dtype=np.int32
            )
    return positions


def _parents(forest: Forest, chains: Sequence[Chain]) -> Int32Array | None:
    if len(forest.nodes) == len(forest.order) and not any(one.apart for one in chains):
        return None
    parents = [
        CARRIED if node.parent < 0 and chains[forest.order[node.first]].apart else node.parent
        for node in forest.nodes
    ]
    return np.array(parents, np.int32)


def _row_order(chains: Sequence[Chain], order: Sequence[int]) -> Int32Array:
    ranges = [range(c.first_row, c.first_row + c.num_rows) for c in (chains[i] for i in order)]
    return np.fromiter(chain.from_iterable(ranges), np.int32)


def _stack_masks(parts: list[tuple[int, UInt64Array]], total: int) -> UInt64Array | None:
    """Return [E, L, Hkv] live masks, all ones where nothing is evicted; None if nowhere."""
    if not parts:
        return None
    full = np.full((total, *parts[0][1].shape[1:]), np.iinfo(np.uint64).max, np.uint64)
    for begin, masks in parts:
        full[begin : begin + len(masks)] = masks
    return full
