"""Layers of pages are put together to blocks: all of them, in order, none too large."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.disagg import outgoing
from kvkeep.disagg.outlet import Batch
from kvkeep.disagg.wire import DESCRIPTOR_BYTES, NO_TAG, Block

SIZE = 1000


class Named:
    """Pages that all have layers of one size."""

    digest = NO_TAG


def pieces_of(batch: Batch) -> list[tuple[int, int, bytes]]:
    block = batch.block
    places = itertools.product(
        range(block.layer, block.layer + block.layers),
        range(block.first_page, block.first_page + block.pages),
    )
    return [(page, layer, data) for (layer, page), data in zip(places, batch.data, strict=True)]


def gathered(pieces: list[tuple[int, int]], size: int = SIZE) -> list[Batch]:
    gathering = outgoing._Gathered(7, Named())  # type: ignore[arg-type]
    batches: list[Batch] = []
    for number, (page, layer) in enumerate(pieces):
        batches += gathering.add(page, layer, number.to_bytes(4, "little") * (size // 4))
    return [*batches, *gathering.all()]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40))
@settings(max_examples=60)
def test_every_piece_is_in_one_block_at_its_place(pieces: list[tuple[int, int]]) -> None:
    batches = gathered(pieces)
    found = [piece for batch in batches for piece in pieces_of(batch)]
    assert [(page, layer) for page, layer, _ in found] == pieces
    assert [data[:4] for *_, data in found] == [n.to_bytes(4, "little") for n in range(len(pieces))]
    assert all(batch.size == sum(map(len, batch.data)) for batch in batches)
    assert all(batch.block.request == 7 for batch in batches)


def test_the_layers_of_a_steps_pages_make_one_block() -> None:
    step = [(page, layer) for layer in range(6) for page in range(3, 7)]
    (batch,) = gathered(step)
    assert batch.block == Block(7, 0, 6, 3, 4, NO_TAG)


def test_blocks_are_worth_a_frame_and_no_more() -> None:
    size = DESCRIPTOR_BYTES // 3 // 4 * 4
    step: list[Any] = [(page, layer) for layer in range(10) for page in range(4)]
    batches = gathered(step, size)
    sent = [sum(map(len, batch.data)) for batch in batches]
    assert all(DESCRIPTOR_BYTES <= one + size < 3 * DESCRIPTOR_BYTES for one in sent[:-1])
    many = gathered([(page, 0) for page in range(100)], size)
    assert all(sum(map(len, batch.data)) < 2 * DESCRIPTOR_BYTES for batch in many)
