"""How work is dealt to threads: by what a token costs in its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kvkeep.ops.cpu import available
from kvkeep.ops.layout import AttentionPlan, Run
from kvkeep.types import PAGE_TOKENS, Layout
from tests.ops.paths import cpu_attention
from tests.oracles import Heads, make_world

HEADS = Heads(4, 1, 64)
CODED = (Layout.K2V2, Layout.K4V2, Layout.K4V4, Layout.K8V8)
SPAN_PAGES = 16


def predicted(layouts: Sequence[Layout], pages: int = SPAN_PAGES) -> float:
    """Return the predicted makespan over its bound of one row each on pages of these layouts."""
    world = make_world(HEADS, Layout.BF16, pages=4 * SPAN_PAGES, layers=1, layer=0)
    count = len(layouts)
    rows = np.arange(count, dtype=np.int32)
    plan = AttentionPlan(
        np.full(count, pages * PAGE_TOKENS - 1, np.int32),
        np.stack([rows, rows + 1, rows, rows + 1], 1),
        np.array([Run(0, pages, 0, int(layout)) for layout in layouts], np.int32),
        np.arange(pages, dtype=np.int32),
    )
    ops = cpu_attention(available()[-1], 2)
    ops.prepare(world.tensor(count, HEADS.q, HEADS.dim), replace(world.kv, unit_bytes=64), plan)
    return ops.makespan_over_bound


def test_equal_items_are_dealt_evenly() -> None:
    assert predicted([Layout.BF16] * 4) == 1.0
    assert predicted([Layout.BF16] * 3) == pytest.approx(4 / 3)


@pytest.mark.parametrize("coded", CODED, ids=lambda layout: layout.name)
def test_a_coded_item_weighs_less_than_one_of_floats(coded: Layout) -> None:
    """One of floats and two of codes on two threads: dealt 1 + 2, not 2 + 1."""
    assert predicted([coded] * 3) == pytest.approx(4 / 3)
    assert predicted([Layout.BF16, coded, coded]) < predicted([Layout.BF16] * 3) - 0.05


def test_codes_of_fewer_bits_weigh_less() -> None:
    found = [predicted([Layout.BF16, coded, coded]) for coded in CODED]
    assert found == sorted(found)
    assert found[-1] > found[0]


@pytest.mark.parametrize("layouts", [[Layout.BF16], [Layout.K2V2], [Layout.BF16, Layout.K2V2]])
def test_what_is_long_is_cut_so_that_no_thread_waits(layouts: list[Layout]) -> None:
    assert predicted(layouts, pages=3 * SPAN_PAGES) <= 1.17
