"""Keys that are asked for before frames are opened, several at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvkeep.errors import KeysGone
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.frame import HEADER_BYTES
from tests.shield.test_cipher import CONTEXT, Ring, opened, refused


def test_keys_of_several_frames_are_asked_for_together_and_wiped() -> None:
    ring = Ring(b"1" * 32)
    sealer = FrameSealer(ring)
    other = replace(CONTEXT, owner="other")
    contexts = [CONTEXT, CONTEXT, other, CONTEXT]
    frames = [sealer.seal(context, b"12345678", [8]) for context in contexts]
    no_frame = memoryview(bytes(HEADER_BYTES))
    pages = [*zip(contexts, frames, strict=True), (CONTEXT, no_frame), (CONTEXT, no_frame[:9])]
    with sealer.expecting([*pages, pages[0]]):
        assert sorted(ring.asked) == [1, 4], "once an owner; the first page is wanted twice"
        for context, frame in pages[:3]:
            assert opened(sealer, context, frame, [8]) == [b"12345678"]
        assert sorted(ring.asked) == [1, 4]
        assert opened(sealer, *pages[0], [8]) == [b"12345678"]
        assert ring.asked[2:] == [1], "its key was used up, and is asked for again"
    assert not any(bytes(key.material).strip(b"\0") for key in ring.given)


def test_a_page_that_two_readers_open_at_once_opens_for_both() -> None:
    ring = Ring()
    sealer = FrameSealer(ring)
    frame = sealer.seal(CONTEXT, b"12345678", [8])
    with sealer.expecting([(CONTEXT, frame)]):
        with sealer.expecting([(CONTEXT, frame)]):
            assert opened(sealer, CONTEXT, frame, [8]) == [b"12345678"]
        assert opened(sealer, CONTEXT, frame, [8]) == [b"12345678"]
    assert not any(bytes(key.material).strip(b"\0") for key in ring.given)


def test_keys_that_are_not_to_be_had_are_told_where_a_frame_is_opened() -> None:
    ring = Ring(b"1" * 32, b"2" * 32)
    sealer = FrameSealer(ring)
    gone = sealer.seal(CONTEXT, b"12345678", [8])
    del ring.epochs[2]
    kept = sealer.seal(CONTEXT, b"12345678", [8])
    with sealer.expecting([(CONTEXT, gone), (CONTEXT, kept)]):
        with pytest.raises(KeysGone):
            next(sealer.open(CONTEXT, gone, [8]))
        assert opened(sealer, CONTEXT, kept, [8]) == [b"12345678"]


def test_a_frame_of_another_context_does_not_open_by_an_expected_key() -> None:
    sealer = FrameSealer(Ring())
    frame = sealer.seal(CONTEXT, b"12345678", [8])
    moved = replace(CONTEXT, chain_hash=b"x" * 32)
    with sealer.expecting([(moved, frame)]):
        refused(sealer, moved, bytes(frame), [8])
