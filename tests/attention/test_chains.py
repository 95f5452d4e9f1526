"""What rows see, and how much of it others may see with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvkeep.attention.chains import Chain, chains_of
from kvkeep.types import BatchGeometry, Layout, PageTag, Segment, View
from kvkeep.watch import EvictState, Watch
from tests.forests import Asked, geometry

SLOTS = range(100, 140)
NO_STAMPS = np.zeros((2, 0, 2, 64), np.int32)
STAGED = range(500, 540)


def coded_step(
    first: int, rows: int, *, window: int, coded: Layout = Layout.F32, staged_from: int = 0
) -> BatchGeometry:
    """Return a step of one request whose pages a codec keeps in `coded`, the model's in BF16."""
    slots = np.array(SLOTS, np.int32)
    view = View(7, PageTag("s"), slots, len(slots), first)
    staged = np.array(STAGED[staged_from:], np.int32)
    segment = Segment(view, 0, rows, first, staged, staged_from)
    return BatchGeometry((segment,), rows, Layout.BF16, coded, window)


def one(step: BatchGeometry) -> Chain:
    (found,) = chains_of(step)
    return found


@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 192, 256, 257, 1024, 1025])
def test_a_rows_own_step_is_never_shareable(length: int) -> None:
    chain = one(geometry([Asked(SLOTS, length)], Layout.BF16))
    position = length - 1
    assert chain.shareable * 64 == position // 128 * 128
    assert len(chain.pages) == position // 64 + 1
    assert chain.pages.tolist() == list(SLOTS[: len(chain.pages)])
    assert (chain.first_position, chain.num_rows, chain.masks) == (position, 1, None)


def test_of_several_rows_the_first_decides_what_is_shareable() -> None:
    chain = one(geometry([Asked(SLOTS, 700, rows=300)], Layout.BF16))
    assert chain.first_position == 400
    assert chain.shareable == 400 // 128 * 2
    assert len(chain.pages) == 11


def test_chains_follow_the_order_of_rows() -> None:
    asked = [Asked(SLOTS, 130, 3, "a"), Asked(SLOTS, 65, 1, "b"), Asked(SLOTS, 900, 20, "a")]
    chains = chains_of(geometry(asked, Layout.F32))
    assert [(c.view, c.first_row, c.num_rows, c.scope) for c in chains] == [
        (0, 0, 3, "a"),
        (1, 3, 1, "b"),
        (2, 4, 20, "a"),
    ]


@pytest.mark.parametrize("kind", ["masks", "watched"])
def test_a_view_that_forgets_or_watches_shares_nothing(kind: str) -> None:
    step = geometry([Asked(SLOTS, 1000), Asked(SLOTS, 1000)], Layout.BF16)
    masks = np.full((20 if kind == "masks" else 0, 2, 2), 5, np.uint64)
    watch = Watch(2000, 1500) if kind == "masks" else Watch(999, 999)
    step.segments[0].view.evict = EvictState(masks, NO_STAMPS, watch)
    watched, other = chains_of(step)
    assert watched.shareable == 0
    assert other.shareable == 14
    if kind == "masks":
        assert watched.masks is not None
        assert watched.masks.shape == (16, 2, 2)
    else:
        assert watched.masks is None


def test_an_evictor_that_has_not_looked_yet_shares() -> None:
    step = geometry([Asked(SLOTS, 1000)], Layout.BF16)
    nothing = np.zeros((0, 2, 2), np.uint64)
    step.segments[0].view.evict = EvictState(nothing, NO_STAMPS, Watch(1200, 1001))
    assert one(step).shareable == 14


@pytest.mark.parametrize(("window", "coded"), [(128, 14), (256, 12), (512, 8), (1024, 0)])
@pytest.mark.parametrize("layout", [Layout.F32, Layout.BF16])
def test_only_encoded_pages_are_shareable(window: int, coded: int, layout: Layout) -> None:
    chain = one(coded_step(1000, 1, window=window, coded=layout))
    assert chain.coded == chain.shareable == coded
    assert chain.pages.tolist() == [*SLOTS[:coded], *STAGED[coded:16]]


@pytest.mark.parametrize(("position", "coded"), [(0, 0), (255, 0), (256, 4), (511, 4), (512, 8)])
def test_a_block_is_seen_encoded_from_the_first_position_after_it(
    position: int, coded: int
) -> None:
    assert one(coded_step(position, 1, window=256)).coded == coded


def test_pages_before_the_staged_ones_are_the_views_own() -> None:
    chain = one(coded_step(1000, 1, window=512, staged_from=8))
    assert chain.pages.tolist() == [*SLOTS[:8], *STAGED[8:16]]
    assert chain.shareable == 8


def test_rows_are_grouped_where_encoded_pages_change() -> None:
    step = coded_step(500, 300, window=128)
    chains = chains_of(step)
    assert [(c.first_row, c.num_rows, c.coded) for c in chains] == [
        (0, 12, 6),
        (12, 128, 8),
        (140, 128, 10),
        (268, 32, 12),
    ]
    assert [c.first_position for c in chains] == [500, 512, 640, 768]
    for chain in chains:
        seen = range(chain.first_position, chain.first_position + chain.num_rows)
        assert {step.coded_pages(step.segments[0], position) for position in seen} == {chain.coded}
        assert chain.shareable <= min(chain.coded, chain.first_position // 64)
        assert len(chain.pages) == seen[-1] // 64 + 1


def test_rows_that_see_nothing_encoded_are_one_chain() -> None:
    step = replace(coded_step(500, 300, window=128), window_tokens=None)
    chain = one(step)
    assert (chain.num_rows, chain.coded, chain.shareable) == (300, 0, 6)
