from __future__ import annotations

from dataclasses import replace

import pytest

from kvkeep.errors import SealError
from kvkeep.sealing import NAME_BYTES, SHELF_BYTES, SealContext
from kvkeep.shield.plain import PlainSealer
from kvkeep.types import PageTag

CONTEXT = SealContext("a", PageTag("a"), b"h" * 32, b"m" * 32, b"s" * 16)
LAYERS = [b"one" * 20, b"two" * 30, b""]
SIZES = [len(layer) for layer in LAYERS]
SEALER = PlainSealer()
FRAME = SEALER.seal(CONTEXT, b"".join(LAYERS), SIZES)


def test_a_frame_opens_in_its_own_context() -> None:
    assert len(FRAME) == SEALER.frame_bytes(SIZES)
    assert list(SEALER.open(CONTEXT, memoryview(FRAME), SIZES)) == LAYERS


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
        given: list[memoryview] = []
        with pytest.raises(SealError):
            given.extend(SEALER.open(CONTEXT, memoryview(changed), SIZES))
        assert given == LAYERS[: len(given)]


@pytest.mark.parametrize("sizes", [SIZES[:2], [*SIZES, 1], [61, 90, 0]])
def test_frames_have_one_length(sizes: list[int]) -> None:
    with pytest.raises(SealError, match="length"):
        next(SEALER.open(CONTEXT, memoryview(FRAME), sizes))


def test_memory_that_is_given_is_used() -> None:
    room, back = memoryview(bytearray(len(FRAME))), memoryview(bytearray(sum(SIZES)))
    assert SEALER.seal(CONTEXT, b"".join(LAYERS), SIZES, room) is room
    assert room == FRAME
    assert list(SEALER.open(CONTEXT, room, SIZES, back)) == LAYERS
    assert back == b"".join(LAYERS)
