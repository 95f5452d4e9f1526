"""A kept forest: patched while its pages only grow, never out of date, and cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType

import numpy as np
import pytest

from kvkeep.attention.cost import SEED
from kvkeep.attention.planner import FlatPlanner, TreePlanner
from kvkeep.ops.layout import AttentionPlan, Run, chains
from kvkeep.types import BatchGeometry, Layout, View
from kvkeep.watch import EvictState, Watch
from tests.attention.test_planner import prefixed, same, shared_pages
from tests.forests import Asked, covers, eager, geometry

NO_STAMPS = np.zeros((2, 0, 2, 64), np.int32)


def grown(asked: Sequence[Asked], by: int) -> list[Asked]:
    return [replace(one, length=one.length + by) for one in asked]


def test_a_patched_plan_covers_what_a_fresh_one_does() -> None:
    planner = eager(2)
    asked = [*prefixed(6, 9, 2, room=4), Asked(range(500, 520), 900), *prefixed(2, 14, 1, room=4)]
    for by in range(200):
        step = geometry(grown(asked, by), Layout.BF16)
        plan, fresh = planner.plan(step), eager(2).plan(step)
        assert covers(plan, step)
        assert covers(fresh, step)
        assert np.array_equal(plan.row_positions, fresh.row_positions)
        assert plan.parents is not None


def test_a_forest_is_kept_until_a_chain_grows_by_sixteen_pages() -> None:
    """Two requests on the same pages: what they share grows, in blocks."""
    planner = eager(1)
    asked = [Asked([*range(60), 90 + i], 20 * 64 + 1) for i in range(2)]
    kept, fresh = [], []
    for pages in range(20, 40):
        step = geometry([replace(one, length=pages * 64 + 1) for one in asked], Layout.BF16)
        plan = planner.plan(step)
        assert covers(plan, step)
        kept.append(shared_pages(plan))
        fresh.append(shared_pages(eager(1).plan(step)))
    assert fresh == [pages - pages % 2 for pages in range(20, 40)]
    assert kept == [20] * 11 + [30] * 9  # 32 pages are seen from position 31 * 64 on


def changed(step: BatchGeometry, index: int, view: View) -> BatchGeometry:
    """Return the step with another view in one request's place."""
    segments = list(step.segments)
    segments[index] = replace(segments[index], view=view, staged=view.slots)
    return replace(step, segments=tuple(segments))


@pytest.mark.parametrize("change", ["joins", "leaves", "order", "rows", "blocks", "first block"])
def test_a_step_of_other_requests_is_planned_afresh(change: str) -> None:
    asked = prefixed(6, 12, 2, room=40)
    if change == "first block":
        asked = [replace(one, length=150) for one in asked]
    before = geometry(asked, Layout.BF16)
    views = [s.view for s in before.segments]
    if change == "joins":
        asked.append(Asked([*range(12), 77], 12 * 64 + 5))
    elif change == "leaves":
        del asked[2]
        del views[2]
    elif change == "order":
        asked.reverse()
        views.reverse()
    elif change == "rows":
        asked[3] = replace(asked[3], rows=200)
    else:
        asked = grown(asked, 1024)
    after = geometry(asked, Layout.BF16)
    for i, segment in enumerate(after.segments[: len(views)]):
        segment.view.id = views[i].id
    planner = eager(2)
    planner.plan(before)
    plan = planner.plan(after)
    assert covers(plan, after)
    assert same(plan, eager(2).plan(after))
    assert plan.parents is not None


def test_a_request_replaced_by_another_of_its_size_is_planned_afresh() -> None:
    planner = eager(2)
    step = geometry(prefixed(4, 12), Layout.BF16)
    planner.plan(step)
    old = step.segments[1].view
    view = View(99, old.tag, np.arange(300, 320, dtype=np.int32), old.num_pages, old.length)
    after = changed(step, 1, view)
    plan = planner.plan(after)
    assert covers(plan, after)
    assert same(plan, eager(2).plan(after))


@pytest.mark.parametrize("kind", ["masks", "watched"])
def test_a_view_that_gets_masks_leaves_the_tree(kind: str) -> None:
    planner = eager(2)
    step = geometry(prefixed(4, 12), Layout.BF16)
    assert not same(planner.plan(step), FlatPlanner().plan(step))
    masks = np.full((14 if kind == "masks" else 0, 2, 2), 3, np.uint64)
    watch = Watch(5000, 5000) if kind == "masks" else Watch(100, 50)
    step.segments[2].view.evict = EvictState(masks, NO_STAMPS, watch)
    plan = planner.plan(step)
    assert covers(plan, step)
    assert same(plan, eager(2).plan(step))
    assert shared_pages(plan) == 12
    assert len(plan.pages) == 12 + 14 + 3 * 2
    (own,) = [runs for rows, runs in chains(plan) if rows == [2]]
    assert [run.page_count for run in own] == [14]
    if kind == "masks":
        assert_masked(plan, own[0])
    else:
        assert plan.masks is None
    step.segments[2].view.evict = None
    assert same(planner.plan(step), eager(2).plan(step))


def assert_masked(plan: AttentionPlan, own: Run) -> None:
    assert plan.masks is not None
    mine = np.zeros(len(plan.pages), bool)
    mine[own.page_begin : own.page_begin + own.page_count] = True
    assert (plan.masks[mine] == 3).all()
    assert (plan.masks[~mine] == np.iinfo(np.uint64).max).all()


def test_masks_stand_beside_their_own_views_pages() -> None:
    step = geometry(prefixed(4, 12), Layout.BF16)
    for i in (1, 3):
        masks = np.full((14, 2, 2), i, np.uint64)
        step.segments[i].view.evict = EvictState(masks, NO_STAMPS, Watch(1, 1))
    plan = eager(2).plan(step)
    assert plan.masks is not None
    assert plan.parents is not None
    for (row,), runs in chains(plan):
        held = [plan.masks[r.page_begin : r.page_begin + r.page_count] for r in runs]
        assert set(np.concatenate(held).flat) == {row if row in {1, 3} else np.iinfo(np.uint64).max}


@pytest.mark.parametrize("page", [0, 5, 11])
def test_a_view_whose_shared_page_was_replaced_reads_its_own(page: int) -> None:
    planner = eager(2)
    step = geometry(prefixed(4, 12), Layout.BF16)
    assert shared_pages(planner.plan(step)) == 12
    step.segments[2].view.replace(page, 777)
    plan = planner.plan(step)
    assert covers(plan, step)
    assert plan.pages.tolist().count(777) == 1
    assert covers(planner.plan(step), step)


def test_a_view_that_dropped_pages_is_planned_by_those_it_has() -> None:
    """Compaction: as many pages as before in units of 16, the shared ones among them gone."""
    planner = eager(2)
    step = geometry(prefixed(4, 12), Layout.BF16)
    planner.plan(step)
    view = step.segments[1].view
    view.assign([*range(300, 312)])
    segments = list(step.segments)
    segments[1] = replace(segments[1], first_position=12 * 64 - 1, staged=view.slots)
    after = replace(step, segments=tuple(segments))
    plan = planner.plan(after)
    assert covers(plan, after)
    assert shared_pages(plan) == 12
    assert 300 in plan.pages


@pytest.mark.parametrize("index", [0, 3])
def test_a_number_given_anew_is_planned_by_its_pages_once_forgotten(index: int) -> None:
    planner = eager(2)
    step = geometry(prefixed(4, 12), Layout.BF16)
    planner.plan(step)
    old = step.segments[index].view
    slots = np.arange(300, 320, dtype=np.int32)
    after = changed(step, index, View(old.id, old.tag, slots, old.num_pages, old.length))
    planner.forget(old)
    plan = planner.plan(after)
    assert covers(plan, after)
    assert shared_pages(plan) == 12


def test_forgetting_a_view_leaves_the_others_nodes() -> None:
    planner = eager(2)
    step = geometry(prefixed(4, 12), Layout.BF16)
    planner.forget(step.segments[0].view)
    planner.plan(step)
    planner.forget(step.segments[0].view)
    plan = planner.plan(step)
    assert covers(plan, step)
    assert shared_pages(plan) == 12


def test_a_row_before_the_end_of_what_was_shared_is_planned_afresh() -> None:
    planner = eager(2)
    step = geometry(prefixed(4, 14, 1), Layout.BF16)
    planner.plan(step)
    segments = list(step.segments)
    segments[3] = replace(segments[3], first_position=12 * 64)
    after = replace(step, segments=tuple(segments))
    plan = planner.plan(after)
    assert covers(plan, after)
    assert same(plan, eager(2).plan(after))


def test_chunks_of_a_prompt_are_planned_with_the_decodes_beside_them() -> None:
    """A chunk of as many rows each step keeps the forest's shape while its leaf grows."""
    planner = eager(2)
    spine = list(range(60))
    for number in range(30):
        asked = [
            Asked([*spine, 200], 40 * 64 + number),
            Asked([*spine, 201], 45 * 64 + number),
            Asked(spine, (number + 8) * 64, rows=64),
        ]
        step = geometry(asked, Layout.BF16)
        assert covers(planner.plan(step), step)


def calls(work: Callable[[], object]) -> int:
    """Return how many functions `work` calls: what it does, on any machine."""
    count = 0

    def heard(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(heard)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_cached_plan_of_64_requests_does_less_than_a_fresh_one() -> None:
    asked = prefixed(64, 64, 4, room=4)
    steps = [geometry(grown(asked, by), Layout.BF16) for by in range(40)]
    planner = TreePlanner(SEED, 4)
    fresh = calls(lambda: planner.plan(steps[0]))
    cached = [calls(lambda step=step: planner.plan(step)) for step in steps[1:]]  # type: ignore[misc]
    assert max(cached) < fresh / 2
    assert max(cached) <= 30 * len(asked)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_where_nothing_is_shared_a_plan_costs_hardly_more_than_the_flat_one(batch: int) -> None:
    """Beside the flat planner's own work: a few calls a request, however long its chain."""
    asked = [Asked(range(40 * i, 40 * i + 40), 2500) for i in range(batch)]
    step, planner = geometry(asked, Layout.BF16), TreePlanner(SEED, 7)
    flat = calls(lambda: FlatPlanner().plan(step))
    fresh = calls(lambda: planner.plan(step))
    kept = calls(lambda: planner.plan(step))
    assert kept <= flat + 4 * batch + 10
    assert fresh <= flat + 6 * batch + 15
