"""Cut a plan into tasks for a device: which program attends which rows over which tiles.

A task is a range of places and a list of visits (page entry, position of its first token), all of
one layout. Rows of a task are (query, head in group), padded to one of `ROW_CLASSES`, one launch
per layout and class. A row with one task is stored at once; a row with more leaves one part per
task, merged root to leaf and left to right. Long lists are split so that tasks times KV heads fill
the device. A task never lists a page that none of its rows sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from operator import itemgetter
from typing import Final, NamedTuple

import numpy as np

from kvkeep.errors import KernelInputError
from kvkeep.ops.checks import check_forest, run_layouts
from kvkeep.ops.layout import AttentionPlan
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout

ROW_CLASSES: Final = (16, 32, 64, 128)
TASK_FIELDS: Final = 8
"""place_begin, num_rows, visit_begin, num_visits, target_begin, and three unused."""

MIN_PAGES: Final = 4
"""No task is made shorter by splitting: 256 tokens."""

_ONE_PART: Final = -1


class Launch(NamedTuple):
    """Tasks of one layout and row class, idle ones last: their number is a power of two."""

    layout: Layout
    rows: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Tasks:
    """A plan as programs execute it."""

    tasks: Int32Array
    """[N, TASK_FIELDS] in order of launches, within one longest first."""
    launches: tuple[Launch, ...]
    visits: Int32Array
    """[V, 2] page entry, position of its first token; a task's stand together."""
    targets: Int32Array
    """One per (task, row): the part to store, or -1 for the result itself."""
    order: Int32Array
    """[T] query row at each place."""
    num_parts: int
    merge_rows: Int32Array
    """[M] query rows to merge, -1 where idle; a row without tasks is merged from nothing."""
    merge_bounds: Int32Array
    """[M + 1]"""
    merge_slots: Int32Array
    """Parts of each merged row, first to last."""

    @property
    def part_slots(self) -> int:
        """Return how many parts there is room for: a power of two."""
        return _padded(max(1, self.num_parts))

    def num_visits(self, launch: Launch) -> int:
        """Return how many tiles one KV head's tasks of a launch visit."""
        return int(self.tasks[launch.begin : launch.end, 3].sum())


class _Piece(NamedTuple):
    """One task: places [begin, end) over `visits` [n, 2] of one layout."""

    begin: int
    end: int
    visits: Int32Array
    layout: int


def cut_tasks(
    plan: AttentionPlan, layout: Layout, group: int, num_kv_heads: int, programs: int
) -> Tasks:
    """Return the tasks of a validated plan for `group` query heads per KV head.

    Raises `KernelInputError` where the plan is no forest over its rows, or a layout is neither
    coded nor `layout`, that of the queries' dtype.
    """
    if not 1 <= group <= ROW_CLASSES[-1]:
        raise KernelInputError(f"{group} query heads per KV head; at most 128 are supported")
    check_forest(plan)
    order = np.arange(len(plan.row_positions), dtype=np.int32)
    if plan.row_order is not None:
        order = np.ascontiguousarray(plan.row_order, np.int32)
    run_layouts(plan, layout)
    whole = list(_row_chunks(plan, order, ROW_CLASSES[-1] // group))
    pieces = list(_split(whole, num_kv_heads, programs))
    return _assemble(pieces, order, group)


def _row_chunks(plan: AttentionPlan, order: Int32Array, most: int) -> Iterator[_Piece]:
    """Yield each group's rows in chunks of at most `most`, with the pages some row sees."""
    for begin, end, run_begin, run_end in plan.groups.tolist():
        listed = list(_by_layout(plan.runs[run_begin:run_end]))
        for first in range(begin, end, most) if listed else ():
            last = min(first + most, end)
            top = plan.row_positions[order[first:last]].max()
            for layout, visits in listed:
                seen = visits[visits[:, 1] <= top]
                if len(seen):
                    yield _Piece(first, last, seen, layout)


def _by_layout(runs: Int32Array) -> Iterator[tuple[int, Int32Array]]:
    """Yield (layout, visits) of runs, those of one layout that follow each other together."""
    for layout, group in groupby(runs.tolist(), key=itemgetter(3)):
        visits = _visits(group)
        if len(visits):
            yield layout, visits


def _visits(runs: Iterable[list[int]]) -> Int32Array:
    parts = [
        np.stack((begin + np.arange(count), first + PAGE_TOKENS * np.arange(count)), axis=1).astype(
            np.int32
        )
        for begin, count, first, _ in runs
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int32)


def _split(pieces: list[_Piece], num_kv_heads: int, programs: int) -> Iterator[_Piece]:
    """Yield pieces whose lists are short enough for `programs` programs to share the work.

    Cuts fall on even pages, that is on multiples of 128 tokens.
    """
    total = sum(len(piece.visits) for piece in pieces)
    longest = _even(max(MIN_PAGES, -(-total * num_kv_heads // programs)))
    for piece in pieces:
        count = len(piece.visits)
        step = _even(-(-count // -(-count // longest)))
        for begin in range(0, count, step):
            yield piece._replace(visits=piece.visits[begin : begin + step])


def _even(pages: int) -> int:
    return pages + pages % 2


def _assemble(pieces: list[_Piece], order: Int32Array, group: int) -> Tasks:
    starts = np.array([piece.begin for piece in pieces], np.int64)
    sizes = np.array([piece.end - piece.begin for piece in pieces], np.int64)
    lengths = np.array([len(piece.visits) for piece in pieces], np.int64)
    target_begin = np.cumsum(sizes) - sizes
    offsets = np.arange(sizes.sum()) - np.repeat(target_begin, sizes)
    places = np.repeat(starts, sizes) + offsets
    per_place = np.bincount(places, minlength=len(order))
    parted = per_place[places] > 1
    targets = np.where(parted, np.cumsum(parted) - 1, _ONE_PART).astype(np.int32)
    columns = np.zeros((len(pieces), TASK_FIELDS), np.int32)
    for i, column in enumerate(
        (starts, sizes, np.cumsum(lengths) - lengths, lengths, target_begin)
    ):
        columns[:, i] = column
    layouts = np.array([piece.layout for piece in pieces], np.int32)
    tasks, launches = _by_class(columns, layouts, group)
    merged = np.flatnonzero(per_place != 1)
    bounds = np.concatenate([[0], np.cumsum(per_place[merged])])
    idle = _padded(len(merged)) - len(merged)
    return Tasks(
        tasks=tasks,
        launches=launches,
        visits=np.concatenate([p.visits for p in pieces]) if pieces else np.zeros((0, 2), np.int32),
        targets=targets,
        order=order,
        num_parts=int(parted.sum()),
        merge_rows=np.concatenate([order[merged], np.full(idle, -1, np.int32)]),
        merge_bounds=np.pad(bounds, (0, idle), mode="edge").astype(np.int32),
        merge_slots=np.argsort(places[parted], kind="stable").astype(np.int32),
    )


def _by_class(
    columns: Int32Array, layouts: Int32Array, group: int
) -> tuple[Int32Array, tuple[Launch, ...]]:
    """Return tasks by layout and row class, each padded with idle ones, and their launches."""
    of_task = np.searchsorted(ROW_CLASSES, columns[:, 1] * group)
    parts: list[Int32Array] = []
    launches: list[Launch] = []
    begin = 0
    for layout, index in product(np.unique(layouts).tolist(), range(len(ROW_CLASSES))):
        own = columns[(of_task == index) & (layouts == layout)]
        if not len(own):
            continue
        own = own[np.argsort(-own[:, 3], kind="stable")]
        end = begin + _padded(len(own))
        parts += [own, np.zeros((end - begin - len(own), TASK_FIELDS), np.int32)]
        launches.append(Launch(Layout(layout), ROW_CLASSES[index], begin, end))
        begin = end
    return np.concatenate(parts) if parts else columns, tuple(launches)


def _padded(count: int) -> int:
    """Return the next power of two; 0 stays 0."""
    return 1 << (count - 1).bit_length() if count else 0
