"""The attention seam: turn a step's geometry into one plan for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from kvkeep.ops.layout import AttentionPlan
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Int32Array, Segment, UInt64Array, View


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
        positions = np.empty(geometry.num_rows, np.int32)
        groups: list[tuple[int, int, int, int]] = []
        runs: list[tuple[int, int, int, int]] = []
        entries: list[Int32Array] = []
        masks: list[tuple[int, UInt64Array]] = []
        total = 0
        for segment in geometry.segments:
            first, row = segment.first_position, segment.first_row
            positions[row : row + segment.num_rows] = np.arange(
                first, first + segment.num_rows, dtype=np.int32
            )
            for begin, end, coded in _row_groups(segment, geometry):
                last = first + end - 1
                pages = _pages(segment, coded, last // PAGE_TOKENS + 1)
                run_begin = len(runs)
                runs.extend(_runs(total, len(pages), coded, geometry))
                groups.append((row + begin, row + end, run_begin, len(runs)))
                entries.append(pages)
                if segment.view.evict is not None and segment.view.evict.masks.size:
                    masks.append((total, segment.view.evict.masks[: len(pages)]))
                total += len(pages)
        return AttentionPlan(
            row_positions=positions,
            groups=np.array(groups, np.int32).reshape(-1, 4),
            runs=np.array(runs, np.int32).reshape(-1, 4),
            pages=np.concatenate(entries) if entries else np.zeros(0, np.int32),
            masks=_stack_masks(masks, total),
        )

    def forget(self, view: View) -> None:
        """Nothing is remembered."""


def _row_groups(segment: Segment, geometry: BatchGeometry) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, end row, encoded pages), cut where the encoded pages change."""
    begin, coded = 0, geometry.coded_pages(segment.first_position)
    if geometry.recent_tokens is not None:
        for row in range(1, segment.num_rows):
            now = geometry.coded_pages(segment.first_position + row)
            if now != coded:
                yield begin, row, coded
                begin, coded = row, now
    yield begin, segment.num_rows, coded


def _pages(segment: Segment, coded: int, count: int) -> Int32Array:
    """Return `count` page slots: the first `coded` encoded, the others in the model's dtype."""
    if segment.staged_from >= count or coded == count:
        return segment.view.slots[:count]
    head = segment.view.slots[: max(coded, segment.staged_from)]
    return np.concatenate([head, segment.staged[len(head) - segment.staged_from :]])[:count]


def _runs(
    begin: int, count: int, coded: int, geometry: BatchGeometry
) -> Iterator[tuple[int, int, int, int]]:
    if geometry.coded_layout == geometry.layout or not coded:
        yield begin, count, 0, int(geometry.layout)
        return
    yield begin, coded, 0, int(geometry.coded_layout)
    if count > coded:
        yield begin + coded, count - coded, coded * PAGE_TOKENS, int(geometry.layout)


def _stack_masks(parts: list[tuple[int, UInt64Array]], total: int) -> UInt64Array | None:
    """Return [E, L, Hkv] live masks, all ones where nothing is evicted; None if nowhere."""
    if not parts:
        return None
    full = np.full((total, *parts[0][1].shape[1:]), np.iinfo(np.uint64).max, np.uint64)
    for begin, masks in parts:
        full[begin : begin + len(masks)] = masks
    return full
