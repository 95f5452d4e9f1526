"""The plan of a part: rows of one request over the first pages of its prefix, held apart."""

from __future__ import annotations

import numpy as np

from kvkeep.ops.layout import STEP_TOKENS, AttentionPlan, Run
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout

STEP_PAGES = STEP_TOKENS // PAGE_TOKENS


def part_pages(prompt_len: int, block_pages: int) -> int:
    """Return how many first pages of a prompt a part may hold: all of them whole for later rows.

    They end where plans are cut and where blocks of a codec's pages end; the last row is here.
    """
    pages, step = (prompt_len - 1) // PAGE_TOKENS, max(block_pages, STEP_PAGES)
    return pages - pages % step


def part_plan(slots: Int32Array, layout: Layout, rows: int) -> AttentionPlan:
    """Return a plan in which `rows` later rows see all of a part's pages."""
    end = len(slots) * PAGE_TOKENS
    return AttentionPlan(
        row_positions=np.full(rows, end, np.int32),
        groups=np.array([[0, rows, 0, 1]], np.int32),
        runs=np.array([Run(0, len(slots), 0, int(layout))], np.int32),
        pages=slots,
    )
