"""Plans cut into tasks: every row meets each of its tiles in exactly one task, in order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.attention.planner import FlatPlanner
from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import AttentionPlan, chains
from kvkeep.ops.tasks import MIN_PAGES, ROW_CLASSES, Tasks, cut_tasks
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Layout
from tests.coded import coded_plan, make_coded_world
from tests.counts import examples
from tests.forests import Asked, eager, geometry
from tests.ops.coded_devices import plan_on_device
from tests.oracles import Heads as HeadShape

LAYOUT = Layout.ROWS_F16


def wanted(plan: AttentionPlan) -> dict[int, list[tuple[int, int]]]:
    """Return, per query row, the (entry, position) of every page it sees, in order."""
    seen = {}
    for rows, runs in chains(plan):
        pages = [
            (run.page_begin + i, run.first_position + i * PAGE_TOKENS)
            for run in runs
            for i in range(run.page_count)
        ]
        for row in rows:
            seen[row] = [page for page in pages if page[1] <= plan.row_positions[row]]
    return seen


def merged(cut: Tasks) -> dict[int, list[int]]:
    """Return the parts of each merged row."""
    bounds = cut.merge_bounds.tolist()
    return {
        row: cut.merge_slots[bounds[i] : bounds[i + 1]].tolist()
        for i, row in enumerate(cut.merge_rows.tolist())
        if row >= 0
    }


def met(cut: Tasks, plan: AttentionPlan) -> dict[int, list[tuple[int, int]]]:
    """Follow every task as the kernels do: what each row sees, joined in the order of merging.

    Another row's part says nothing of this one, though it be over the same tiles.
    """
    by_part: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    found: dict[int, list[tuple[int, int]]] = {}
    for place, rows, begin, count, target, *_ in cut.tasks.tolist():
        visits = [(entry, at) for entry, at in cut.visits[begin : begin + count].tolist()]
        for i in range(rows):
            row, part = int(cut.order[place + i]), int(cut.targets[target + i])
            own = [visit for visit in visits if visit[1] <= plan.row_positions[row]]
            if part < 0:
                assert row not in found, "two tasks store one row"
                found[row] = own
            else:
                assert part not in by_part, "two tasks store one part"
                by_part[part] = row, own
    assert sorted(by_part) == list(range(cut.num_parts))
    for row, parts in merged(cut).items():
        assert row not in found
        own_parts = [by_part[part][1] for part in parts if by_part[part][0] == row]
        found[row] = [visit for part in own_parts for visit in part]
    return found


def check(plan: AttentionPlan, group: int, heads: int, programs: int) -> Tasks:
    cut = cut_tasks(plan, LAYOUT, group, heads, programs)
    assert met(cut, plan) == wanted(plan)
    for launch in cut.launches:
        own = cut.tasks[launch.begin : launch.end]
        assert len(own) & (len(own) - 1) == 0
        assert launch.rows in ROW_CLASSES
        used = own[own[:, 1] > 0]
        assert (used[:, 1] * group <= launch.rows).all()
        assert launch.rows == ROW_CLASSES[0] or (used[:, 1] * group * 2 > launch.rows).all()
        assert (np.diff(used[:, 3]) <= 0).all(), "longest first"
    return cut


@st.composite
def forests(draw: st.DrawFn) -> BatchGeometry:
    """Random forests: requests branch off earlier ones at random pages, some with many rows."""
    free = iter(range(10_000))
    asked: list[Asked] = []
    for _ in range(draw(st.integers(1, 9))):
        slots: list[int] = []
        branches: bool = draw(st.booleans())
        if asked and branches:
            other = asked[draw(st.integers(0, len(asked) - 1))]
            slots = list(other.slots[: draw(st.integers(0, other.length // PAGE_TOKENS))])
        slots += [next(free) for _ in range(draw(st.integers(1, 40)))]
        length = (len(slots) - 1) * PAGE_TOKENS + draw(st.integers(1, PAGE_TOKENS))
        asked.append(Asked(slots, length, draw(st.integers(1, min(length, 200)))))
    return geometry(asked, LAYOUT)


@given(
    step=forests(),
    group=st.sampled_from([1, 4, 7, 128]),
    heads=st.sampled_from([1, 2, 8]),
    programs=st.sampled_from([1, 16, 264, 5000]),
)
@settings(max_examples=examples(24, 60), deadline=None)
def test_every_row_meets_each_of_its_tiles_once(
    step: BatchGeometry, group: int, heads: int, programs: int
) -> None:
    for plan in (FlatPlanner().plan(step), eager(group).plan(step)):
        check(plan, group, heads, programs)


def test_a_task_has_one_layout() -> None:
    world = make_coded_world(HeadShape(2, 1, 16), Layout.BF16, pages=80)
    parts = [(world.add(Layout.K2V2, 30, 200), [2100, 2000, 1900, 5])]
    parts.append((world.add(Layout.K8V8, 4, 0), [200]))
    plan = plan_on_device(world, coded_plan(world, parts))
    cut = cut_tasks(plan, Layout.ROWS_BF16, 2, 1, 16)
    assert met(cut, plan) == wanted(plan)
    layouts = np.repeat(plan.runs[:, 3], plan.runs[:, 1])
    visits = 0
    for launch in cut.launches:
        for _, _, begin, count, *_ in cut.tasks[launch.begin : launch.end].tolist():
            assert (layouts[cut.visits[begin : begin + count, 0]] == launch.layout).all()
        visits += cut.num_visits(launch)
    assert {launch.layout for launch in cut.launches} == set(layouts.tolist())
    assert visits == len(cut.visits)


def test_a_lost_visit_is_caught() -> None:
    plan = FlatPlanner().plan(geometry([Asked(range(9), 9 * PAGE_TOKENS)], LAYOUT))
    cut = cut_tasks(plan, LAYOUT, 1, 1, 1)
    broken = replace(cut, visits=np.roll(cut.visits, 1, axis=0))
    assert met(broken, plan) != wanted(plan)


def with_the_wrong_partial(cut: Tasks) -> Tasks:
    """Return the tasks with the published builder's fault: what a row merges first is found by its
    distance from the row before it, not from its parent's first row.
    """
    slots, begins = cut.merge_slots.copy(), cut.merge_bounds[: int((cut.merge_rows >= 0).sum())]
    slots[begins[1:]] = cut.merge_slots[begins[0]] + 1
    return replace(cut, merge_slots=slots)


@pytest.mark.parametrize(("leaves", "wrong"), [(2, 0), (3, 1), (4, 2), (8, 6), (16, 14), (32, 30)])
def test_another_rows_part_of_the_same_node_is_caught(leaves: int, wrong: int) -> None:
    """Every part lies over the right tiles: that a query is not another one must show."""
    asked = [Asked([*range(4), 9 + i], 4 * PAGE_TOKENS + 1 + i) for i in range(leaves)]
    plan = eager(1).plan(geometry(asked, LAYOUT))
    cut, want = check(plan, 1, 1, 1), wanted(plan)
    got = met(with_the_wrong_partial(cut), plan)
    assert sum(got[row] != want[row] for row in want) == wrong


def test_one_task_per_row_leaves_nothing_to_merge() -> None:
    step = geometry([Asked([i], 9 + i) for i in range(20)], LAYOUT)
    cut = check(FlatPlanner().plan(step), 1, 8, 264)
    assert cut.num_parts == 0
    assert len(cut.merge_rows) == 0
    assert (cut.targets == -1).all()


@pytest.mark.parametrize(
    ("programs", "tasks"), [(1, 1), (8, 1), (64, 8), (10**6, 128 // MIN_PAGES)]
)
def test_long_lists_are_split_to_fill_the_device(programs: int, tasks: int) -> None:
    plan = FlatPlanner().plan(geometry([Asked(range(128), 128 * PAGE_TOKENS)], LAYOUT))
    cut = check(plan, 1, 8, programs)
    assert len(cut.tasks[cut.tasks[:, 1] > 0]) == tasks
    assert (cut.visits[cut.tasks[:tasks, 2], 1] % 128 == 0).all()


def test_new_tokens_skip_the_pages_after_them() -> None:
    plan = FlatPlanner().plan(geometry([Asked(range(4), 4 * PAGE_TOKENS, rows=256)], LAYOUT))
    cut = check(plan, 1, 1, 1)
    assert sorted(cut.tasks[cut.tasks[:, 1] > 0][:, 3].tolist()) == [2, 4]


def test_a_row_that_sees_nothing_is_merged_from_nothing() -> None:
    step = geometry([Asked([1, 2], 70), Asked([3], 5)], LAYOUT)
    plan = FlatPlanner().plan(step)
    plan.runs[1, 1] = 0
    cut = check(plan, 2, 1, 1)
    assert merged(cut) == {1: []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_order": [0, 0, 1, 2]}, "every row once"),
        ({"parents": [-1, 3, 0, 0, 0]}, "before its parent"),
        ({"groups": (2, 1, 5)}, "parent lacks"),
        ({"groups": (2, 0, 0)}, "leaf groups"),
        ({"groups": (2, 0, 4)}, "end before"),
        ({"groups": (0, 0, -1)}, "before its parent|parent lacks|end before"),
        ({"runs": (0, 3, int(Layout.BF16))}, "layout"),
    ],
)
def test_plans_that_are_no_forest_are_refused(
    changes: dict[str, list[int] | tuple[int, int, int]], message: str
) -> None:
    asked = [Asked([*range(6), 20 + i], 6 * PAGE_TOKENS + 9) for i in range(4)]
    plan = eager(1).plan(geometry(asked, LAYOUT))
    assert plan.parents is not None
    for name, value in changes.items():
        if isinstance(value, tuple):
            array = getattr(plan, name).copy()
            array[value[0], value[1]] = value[2]
        else:
            array = np.array(value, np.int32)
        plan = replace(plan, **{name: array})
    with pytest.raises(KernelInputError, match=message):
        cut_tasks(plan, LAYOUT, 1, 1, 1)


def test_wide_groups_are_refused() -> None:
    plan = FlatPlanner().plan(geometry([Asked([1], 5)], LAYOUT))
    with pytest.raises(KernelInputError, match="at most 128"):
        cut_tasks(plan, LAYOUT, 129, 1, 1)
