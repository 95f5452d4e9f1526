from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvkeep.errors import SealError
from kvkeep.sealing import NAME_BYTES, SHELF_BYTES, SealContext
from kvkeep.shield.frame import SLICE_BYTES
from kvkeep.shield.plain import PlainSealer
from kvkeep.types import PageTag

CONTEXT = SealContext("a", PageTag("a"), b"h" * 32, b"m" * 32, b"s" * 16)
LAYERS = [b"one" * 20, b"two" * 30, b""]
PAGE = b"".join(LAYERS)
SIZES = [len(layer) for layer in LAYERS]
SEALER = PlainSealer()
FRAME = SEALER.seal(CONTEXT, PAGE, SIZES)


def test_a_frame_opens_in_its_own_context() -> None:
    assert len(FRAME) == SEALER.frame_bytes(SIZES)
    assert list(SEALER.open(CONTEXT, memoryview(FRAME), SIZES)) == [PAGE]


def test_names_say_what_a_page_is_bound_to() -> None:
    name = SEALER.name_of(CONTEXT)
    assert len(name) == NAME_BYTES
    assert name == SEALER.name_of(replace(CONTEXT))
    assert name != SEALER.name_of(replace(CONTEXT, owner="b"))
    assert len(SEALER.shelf_of("a")) == SHELF_BYTES
    assert SEALER.shelf_of("a") != SEALER.shelf_of("b")


@pytest.mark.parametrize(
    "other",
    [
        replace(CONTEXT, owner="b"),
        replace(CONTEXT, chain_hash=b"i" * 32),
        replace(CONTEXT, spec_digest=b"t" * 16),
    ],
)
def test_another_context_gets_nothing(other: SealContext) -> None:
    with pytest.raises(SealError, match="another page's"):
        next(SEALER.open(other, memoryview(FRAME), SIZES))


def test_no_changed_byte_is_given_out() -> None:
    for at in range(len(FRAME)):
        changed = bytearray(FRAME)
        changed[at] ^= 1
        with pytest.raises(SealError):
            next(SEALER.open(CONTEXT, memoryview(changed), SIZES))


@pytest.mark.parametrize("changed_layer", range(4))
def test_large_layers_are_given_out_before_a_changed_one(changed_layer: int) -> None:
    sizes = [SLICE_BYTES, SLICE_BYTES // 2, SLICE_BYTES // 2, 7]
    page = np.arange(sum(sizes), dtype=np.uint64).astype(np.uint8).data
    frame = SEALER.seal(CONTEXT, page, sizes)
    whole = list(SEALER.open(CONTEXT, frame, sizes))
    assert [len(run) for run in whole] == [SLICE_BYTES, SLICE_BYTES, 7]
    assert b"".join(whole) == page
    frame[len(frame) - sum(sizes[changed_layer:])] ^= 1
    given: list[memoryview] = []
    with pytest.raises(SealError, match="changed"):
        given.extend(SEALER.open(CONTEXT, frame, sizes))
    assert b"".join(given) == page[: (0, SLICE_BYTES, SLICE_BYTES, 2 * SLICE_BYTES)[changed_layer]]


@pytest.mark.parametrize("sizes", [SIZES[:2], [*SIZES, 1], [61, 90, 0]])
def test_frames_have_one_length(sizes: list[int]) -> None:
    with pytest.raises(SealError, match="length"):
        next(SEALER.open(CONTEXT, memoryview(FRAME), sizes))


def test_memory_that_is_given_is_used() -> None:
    room, back = memoryview(bytearray(len(FRAME))), memoryview(bytearray(sum(SIZES)))
    assert SEALER.seal(CONTEXT, PAGE, SIZES, room) is room
    assert room == FRAME
    assert list(SEALER.open(CONTEXT, room, SIZES, back)) == [PAGE]
    assert back == PAGE
