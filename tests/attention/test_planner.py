"""Plans: a tree where it pays, the flat one elsewhere, and a cache that is never out of date."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from kvkeep.attention.cost import SEED, CostModel
from kvkeep.attention.planner import FlatPlanner, TreePlanner
from kvkeep.errors import KernelInputError
from kvkeep.ops.cpu import available
from kvkeep.ops.layout import AttentionPlan, chains
from kvkeep.types import BatchGeometry, Layout, PageTag, Segment, View
from tests.forests import ALWAYS, Asked, Filled, covers, eager, filled, geometry
from tests.ops.paths import ops_for
from tests.oracles import Heads

HEADS = Heads(4, 2, 64)


def same(one: AttentionPlan, other: AttentionPlan) -> bool:
    """Tell whether two plans are equal, array by array."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(AttentionPlan)]
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in pairs
    )


def prefixed(requests: int, shared: int, own: int = 2, *, room: int = 0) -> list[Asked]:
    """Return requests with `shared` pages in common and `own` of their own, `room` yet unused."""
    return [
        Asked(
            [*range(shared), *range(1000 + 100 * i, 1000 + 100 * i + own + room)],
            (shared + own) * 64 - 3 * (i % 9),
        )
        for i in range(requests)
    ]


def shared_pages(plan: AttentionPlan) -> int:
    """Return the pages of groups that others go on from."""
    parents = set() if plan.parents is None else set(plan.parents.tolist()) - {-1}
    return sum(int(plan.runs[plan.groups[g, 2] : plan.groups[g, 3], 1].sum()) for g in parents)


# The flat plan, and where it is chosen


def test_the_flat_plan_reads_every_requests_own_pages() -> None:
    step = geometry(prefixed(5, 6), Layout.BF16)
    plan = FlatPlanner().plan(step)
    assert covers(plan, step)
    assert (plan.parents, plan.row_order, plan.masks) == (None, None, None)
    assert len(plan.pages) == 5 * 8


@pytest.mark.parametrize("model", [ALWAYS, SEED], ids=["eager", "seed"])
def test_where_nothing_is_shared_the_plan_is_the_flat_one(model: CostModel) -> None:
    asked = [Asked(range(40 * i, 40 * i + 40), 2500 + i) for i in range(8)]
    step = geometry(asked, Layout.BF16)
    assert same(TreePlanner(model, 2).plan(step), FlatPlanner().plan(step))


def test_an_empty_step_has_an_empty_plan() -> None:
    step = geometry([], Layout.BF16)
    assert same(eager(1).plan(step), FlatPlanner().plan(step))


@pytest.mark.parametrize(("own", "tree"), [(200, False), (80, False), (60, True), (10, True)])
def test_a_tree_is_chosen_from_a_twentieth_of_gain(own: int, tree: bool) -> None:
    """Eight pages of two requests: one reading saved of 2 (8 + own)."""
    step = geometry(prefixed(2, 8, own), Layout.BF16)
    assert (8 / (2 * (8 + own)) > 0.05) is tree
    assert (eager(1).plan(step).parents is not None) is tree


@pytest.mark.parametrize(("shared", "tree"), [(2, False), (4, True)])
def test_below_256_tokens_nothing_is_shared(shared: int, tree: bool) -> None:
    step = geometry(prefixed(30, shared), Layout.BF16)
    assert (eager(1).plan(step).parents is not None) is tree


def test_reading_that_costs_nothing_is_not_shared() -> None:
    step = geometry(prefixed(16, 20), Layout.BF16)
    assert TreePlanner(CostModel(500.0, 0.0, 2.0, 40.0), 8).plan(step).parents is None
    assert TreePlanner(CostModel(0.0, 0.0, 0.0), 8).plan(step).parents is None


@pytest.mark.parametrize(("window", "tree"), [(640, True), (None, False)])
def test_shared_pages_are_weighed_as_they_are_stored(window: int | None, tree: bool) -> None:
    """Reading is dear where pages are coded and free where they are not."""
    step = replace(geometry(prefixed(16, 20), Layout.BF16), coded_layout=Layout.K2V2)
    planner = TreePlanner(CostModel(0.0, 0.0, 1.0), 8, coded=ALWAYS)
    plan = planner.plan(replace(step, window_tokens=window))
    assert (plan.parents is not None) is tree
    assert shared_pages(plan) == (20 if tree else 0)
    other = TreePlanner(ALWAYS, 8, coded=CostModel(0.0, 0.0, 1.0))
    assert (other.plan(replace(step, window_tokens=window)).parents is None) is tree


def test_scopes_read_apart_where_asked() -> None:
    asked = [replace(one, scope="ab"[i % 2]) for i, one in enumerate(prefixed(8, 10))]
    step = geometry(asked, Layout.BF16)
    plan = eager(1, across_scopes=False).plan(step)
    assert covers(plan, step)
    assert plan.parents is not None
    assert plan.row_order is not None
    for begin, end, *_ in plan.groups.tolist():
        assert len({asked[row].scope for row in plan.row_order[begin:end]}) == 1
    assert shared_pages(plan) == 20
    assert shared_pages(eager(1).plan(step)) == 10


@pytest.mark.parametrize(("planner", "shared"), [(eager(1), 10), (FlatPlanner(), 0)])
def test_a_node_of_two_layouts_is_cut_where_they_meet(
    planner: TreePlanner | FlatPlanner, shared: int
) -> None:
    """Only encoded pages are read together; read apart, both layouts are in one node."""
    slots = [np.array([*range(12), 50 + 9 * i, 51 + 9 * i, 52 + 9 * i], np.int32) for i in range(3)]
    staged = [s[10:] + 500 for s in slots]
    segments = tuple(
        Segment(View(i, PageTag("s"), slots[i], 15, 930), i, 1, 930 + i, staged[i], 10)
        for i in range(3)
    )
    step = BatchGeometry(segments, 3, Layout.BF16, Layout.F32, 640)
    plan = planner.plan(step)
    assert shared_pages(plan) == shared
    for rows, runs in chains(plan):
        (row,) = rows
        assert [(r.page_count, r.first_position, r.layout) for r in runs] == [
            (10, 0, Layout.F32),
            (5, 640, Layout.BF16),
        ]
        pages = [plan.pages[r.page_begin : r.page_begin + r.page_count].tolist() for r in runs]
        assert pages == [slots[row][:10].tolist(), staged[row].tolist()]


# The published builder's fault: a child's rows counted from the node before, not from its parent


def tree_of(branches: int, levels: int) -> list[Asked]:
    """Return the leaves of a full tree of nodes of four pages, each leaf one page more."""
    asked = []
    for leaf in range(branches ** (levels - 1)):
        slots: list[int] = []
        for level in range(levels - 1):
            node = leaf // branches ** (levels - 1 - level)
            begin = 4 * (sum(branches**n for n in range(level)) + node)
            slots += range(begin, begin + 4)
        asked.append(Asked([*slots, 100 + leaf], len(slots) * 64 + 1 + leaf))
    return asked


def with_the_fault(plan: AttentionPlan) -> AttentionPlan:
    """Return the plan with each group's rows placed by its distance from the group before it."""
    assert plan.parents is not None
    groups = plan.groups.copy()
    for g, parent in enumerate(plan.parents.tolist()):
        if parent >= 0:
            begin = groups[parent, 0] + plan.groups[g, 0] - plan.groups[g - 1, 0]
            length = plan.groups[g, 1] - plan.groups[g, 0]
            groups[g, 0:2] = begin, begin + length
    return replace(plan, groups=groups)


def misplaced(one: AttentionPlan, other: AttentionPlan) -> int:
    """Return how many leaves hold other rows."""
    return sum(a[0] != b[0] for a, b in zip(chains(one), chains(other), strict=True))


@pytest.fixture(scope="module")
def pool() -> Filled:
    return filled(ops_for("portable"), HEADS, Layout.F32, 132)


SHAPES = [(2, 2, 0), (3, 2, 1), (4, 2, 2), (8, 2, 6), (16, 2, 14), (2, 3, 2), (2, 4, 6), (5, 3, 23)]


@pytest.mark.parametrize(("branches", "levels", "wrong"), SHAPES)
def test_rows_counted_from_the_node_before_are_caught(
    pool: Filled, branches: int, levels: int, wrong: int
) -> None:
    step = geometry(tree_of(branches, levels), Layout.F32)
    plan = eager(2).plan(step)
    assert plan.parents is not None
    assert covers(plan, step)
    faulty = with_the_fault(plan)
    assert misplaced(faulty, plan) == wrong
    assert covers(faulty, step) is (wrong == 0)
    q = pool.queries(step.num_rows)
    for kernel in available():
        ops_for(kernel).attend(q, pool.world.kv, plan)
        if wrong:
            with pytest.raises(KernelInputError):
                ops_for(kernel).attend(q, pool.world.kv, faulty)
