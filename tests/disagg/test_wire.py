"""Whatever bytes arrive, in whatever pieces: frames or one `WireError`, and bounded memory."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.disagg import wire
from kvkeep.disagg.wire import (
    Beat,
    Block,
    Control,
    Credit,
    Drop,
    Freed,
    Hello,
    Hold,
    Holds,
    Lost,
    Mapped,
    Want,
)
from kvkeep.errors import WireError

HELLO = Hello("digest", {"float": "f0"}, "off", 1 << 20)
RECORDS: list[Control] = [
    HELLO,
    Want(3, "request", 1, 9, bytes(32), bytes(16)),
    Hold(3, "request", 9, bytes(32), bytes(16)),
    Holds(3),
    Lost(3, 4),
    Drop(3),
    Credit(1 << 20),
    Beat(),
    Mapped("kvkeep-0", 1 << 20, 4096, bytes(wire.HEADER_BYTES)),
    Freed(),
]
BLOCK = Block(request=3, layer=1, layers=2, first_page=4, pages=5, tag=bytes(range(16)))

counts = st.integers(0, (1 << 32) - 1)
small = st.integers(1, (1 << 16) - 1)
blocks = st.builds(
    Block, counts, st.integers(0, 65535), small, counts, st.integers(1, 1 << 31),
    st.binary(min_size=16, max_size=16),
)  # fmt: skip
items = st.lists(
    st.one_of(st.sampled_from(RECORDS), st.tuples(blocks, st.binary(min_size=1, max_size=300))),
    max_size=6,
)


def encoded(item: Any) -> bytes:
    if isinstance(item, tuple):
        block, payload = item
        return wire.pages_header(block, payload) + bytes(payload)
    return wire.control_bytes(item)


def told(frame: wire.Frame) -> Any:
    return frame.control() if frame.block is None else (frame.block, bytes(frame.payload))


@pytest.mark.parametrize("kind", [wire.Kind.PAGES, wire.Kind.ROWS])
def test_a_frame_says_whether_it_carries_pages_or_rows(kind: wire.Kind) -> None:
    header = wire.rows_header if kind is wire.Kind.ROWS else wire.pages_header
    (frame,) = wire.FrameParser().feed(header(BLOCK, b"some") + b"some")
    assert (frame.kind, frame.block, bytes(frame.payload)) == (kind, BLOCK, b"some")


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(items, st.lists(st.integers(0, 4000), max_size=8))
@settings(max_examples=60)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    sent: list[Any], cuts: list[int]
) -> None:
    parser = wire.FrameParser()
    data = b"".join(map(encoded, sent))
    assert [told(f) for part in pieces(data, cuts) for f in parser.feed(part)] == sent
    assert parser.held_bytes == 0


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
@settings(max_examples=60)
def test_any_bytes_give_frames_or_a_wire_error(data: bytes, cuts: list[int]) -> None:
    outcome(wire.FrameParser(), pieces(data, cuts))


@given(items, st.integers(0, 1 << 30), st.integers(1, 255))
@settings(max_examples=60)
def test_a_changed_byte_gives_no_other_record(sent: list[Any], at: int, flip: int) -> None:
    data = bytearray(b"".join(map(encoded, sent)))
    if not data:
        return
    data[at % len(data)] ^= flip
    for frame in outcome(wire.FrameParser(), [bytes(data)]):
        assert frame.block is not None or frame.control() in sent
        assert frame.block is None or frame.block in [s[0] for s in sent if isinstance(s, tuple)]


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_any_payload_is_a_record_or_a_wire_error(payload: bytes) -> None:
    frame = wire.Frame(None, memoryview(payload))
    with contextlib.suppress(WireError):
        assert isinstance(frame.control(), msgspec.Struct)


def outcome(parser: wire.FrameParser, parts: list[bytes]) -> list[wire.Frame]:
    """Return what comes out; after an error nothing more may be taken."""
    found: list[wire.Frame] = []
    try:
        for part in parts:
            for frame in parser.feed(part):
                if frame.block is None:
                    frame.control()
                found.append(frame)
            assert parser.held_bytes <= wire.HEADER_BYTES + wire.PAGES_BYTES
    except WireError:
        return found
    return found


def test_nothing_is_allocated_before_a_header_is_proven() -> None:
    parser = wire.FrameParser(pages_bytes=1000)
    header = wire.pages_header(BLOCK, bytes(900))
    assert list(parser.feed(header[:-1])) == []
    assert parser.held_bytes == wire.HEADER_BYTES - 1
    assert list(parser.feed(header[-1:])) == []
    assert parser.held_bytes == 900
    broken = bytearray(header)
    broken[24] ^= 1
    with pytest.raises(WireError, match="changed"):
        list(wire.FrameParser().feed(bytes(broken)))


def test_what_is_too_long_is_refused_on_both_sides() -> None:
    with pytest.raises(WireError, match="at most 1000"):
        list(wire.FrameParser(pages_bytes=1000).feed(wire.pages_header(BLOCK, bytes(1001))))
    with pytest.raises(WireError, match="fit in a frame"):
        wire.pages_header(BLOCK, bytes(wire.PAGES_BYTES + 1))
    with pytest.raises(WireError, match="fit in a frame"):
        wire.control_bytes(replace_forms({str(i): "x" * 250 for i in range(1000)}))


def replace_forms(forms: dict[str, str]) -> Hello:
    return msgspec.structs.replace(HELLO, forms=forms)


def test_a_parser_that_failed_stays_so() -> None:
    parser = wire.FrameParser()
    with pytest.raises(WireError, match="no frame"):
        list(parser.feed(bytes(wire.HEADER_BYTES)))
    with pytest.raises(WireError, match="nothing is read"):
        list(parser.feed(wire.control_bytes(Beat())))


def test_another_version_or_kind_is_refused_by_its_number() -> None:
    other = bytearray(wire.control_bytes(Beat()))
    other[2] = 9
    with pytest.raises(WireError, match=f"this worker speaks {wire.VERSION} and the other 9"):
        list(wire.FrameParser().feed(bytes(other)))
    empty = wire.pages_header(BLOCK._replace(pages=0), b"x")
    with pytest.raises(WireError, match="holds none"):
        list(wire.FrameParser().feed(empty))


def test_pages_are_no_record() -> None:
    with pytest.raises(WireError, match="where a record was due"):
        wire.Frame(BLOCK, memoryview(b"")).control()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other"}, "model: this worker has 'digest' and the other 'other'"),
        ({"sealer": "aes-256-gcm"}, "sealer: this worker has 'off' and the other 'aes-256-gcm'"),
        ({"forms": {"float": "f1"}}, r"codec: .*'f0'.*'f1'"),
        ({"forms": {"k2v2": "f0"}}, r"codec: .*'float'.*'k2v2'"),
    ],
)
def test_workers_that_do_not_fit_are_refused_naming_both_values(
    change: dict[str, Any], named: str
) -> None:
    wire.check_hello(HELLO, msgspec.structs.replace(HELLO, window_bytes=5))
    with pytest.raises(WireError, match=named):
        wire.check_hello(HELLO, msgspec.structs.replace(HELLO, **change))
