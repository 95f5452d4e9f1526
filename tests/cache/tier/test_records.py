from __future__ import annotations

import pytest

from kvkeep.cache.tier.records import (
    HEADER_BYTES,
    MAGIC,
    BadRecord,
    Flag,
    Record,
    decode,
    encode,
    frame_of,
    record_bytes,
    scan,
)
from tests.cache.tier.disks import Disk

FRAME = bytes(range(200))
RECORD = Record(b"n" * 24, b"s" * 16, 7, 12.5, Flag.FRAME, len(FRAME))
RAW = b"".join(encode(RECORD, FRAME))


def test_a_record_comes_back() -> None:
    assert len(RAW) == RECORD.size == record_bytes(len(FRAME))
    assert decode(RAW) == RECORD
    assert frame_of(RAW, RECORD.name, RECORD.seq) == FRAME


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_every_changed_bit_is_seen(bit: int) -> None:
    for at in range(len(RAW)):
        raw = bytearray(RAW)
        raw[at] ^= 1 << bit
        with pytest.raises(BadRecord):
            frame_of(bytes(raw), RECORD.name, RECORD.seq)
        assert at >= HEADER_BYTES or decode(bytes(raw)) is None


@pytest.mark.parametrize("length", [0, 3, HEADER_BYTES - 1, HEADER_BYTES, len(RAW) - 1])
def test_a_short_record_is_none(length: int) -> None:
    with pytest.raises(BadRecord):
        frame_of(RAW[:length], RECORD.name, RECORD.seq)


def test_another_pages_record_is_none() -> None:
    with pytest.raises(BadRecord, match="swapped"):
        frame_of(RAW, b"m" * 24, RECORD.seq)
    with pytest.raises(BadRecord, match="swapped"):
        frame_of(RAW, RECORD.name, RECORD.seq + 1)


def segment(*parts: bytes) -> Disk:
    return Disk({"s": bytearray(b"".join(parts))})


def test_records_are_found_in_order() -> None:
    found = scan(segment(RAW, RAW).open("s"))
    assert [offset for offset, _ in found.found] == [0, len(RAW)]
    assert (found.bad, found.end) == (0, 2 * len(RAW))


@pytest.mark.parametrize("torn", [1, HEADER_BYTES - 1, HEADER_BYTES + 1, len(RAW) - 1])
def test_a_torn_tail_is_cut_off(torn: int) -> None:
    found = scan(segment(RAW, RAW[:torn]).open("s"))
    assert (len(found.found), found.bad, found.end) == (1, 1, len(RAW))


@pytest.mark.parametrize("between", [b"\0" * 9, MAGIC * 30, RAW[: HEADER_BYTES - 1], b"x" * 2000])
def test_what_is_no_record_is_skipped(between: bytes) -> None:
    found = scan(segment(RAW, between, RAW).open("s"))
    assert [offset for offset, _ in found.found] == [0, len(RAW) + len(between)]
    assert found.bad == 1
    assert found.end == 2 * len(RAW) + len(between)


def test_a_magic_across_two_windows_is_found() -> None:
    for pad in range((1 << 20) - 6, (1 << 20) + 2):
        found = scan(segment(b"\1" * pad, RAW).open("s"))
        assert [offset for offset, _ in found.found] == [pad]
