"""A record of a segment: a checked header, a frame, a checksum over both.

    magic 4 | version 2 | flags 2 | length 4 | seq 8 | name 24 | shelf 16 | expires 8 | crc 4
    frame [length]
    crc 4

Little-endian; checksums are CRC-32C. A header that is good says where the next record begins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import Final, NamedTuple, Protocol

from crc32c import crc32c

from kvkeep.sealing import NAME_BYTES, SHELF_BYTES

MAGIC: Final = b"KvR\x01"
VERSION: Final = 1
_FIELDS: Final = struct.Struct(f"<4sHHIQ{NAME_BYTES}s{SHELF_BYTES}sd")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _FIELDS.size + _CRC.size
_SEARCH_BYTES: Final = 1 << 20


class Readable(Protocol):
    """What a segment is read from; raises `OSError`."""

    def read(self, offset: int, length: int) -> bytes:
        """Return so many bytes, fewer at the end."""

    def size(self) -> int:
        """Return the length in bytes."""


class BadRecord(Exception):
    """Bytes are not the record they should be; says what differs."""


class Flag(IntFlag):
    """What a record stands for."""

    FRAME = 0
    GONE = 1
    """Older records of this name hold nothing any more; it has no frame."""
    PURGED = 2
    """And their bytes are to be overwritten soon."""


class Record(NamedTuple):
    """A header's fields."""

    name: bytes
    shelf: bytes
    seq: int
    """Larger than that of every record written before; copies keep it."""
    expires_s: float
    """Unix time; 0: never."""
    flags: Flag
    length: int
    """Of the frame, in bytes."""

    @property
    def size(self) -> int:
        """Return the bytes of the whole record."""
        return record_bytes(self.length)


def record_bytes(length: int) -> int:
    """Return the bytes of a record whose frame has so many."""
    return HEADER_BYTES + length + _CRC.size


def encode(record: Record, frame: bytes | memoryview) -> tuple[bytes, memoryview, bytes]:
    """Return a record's bytes in three parts, the frame as it is: it is long, and copies cost."""
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        record.flags,
        record.length,
        record.seq,
        record.name,
        record.shelf,
        record.expires_s,
    )
    header = fields + _CRC.pack(crc32c(fields))
    view = memoryview(frame)
    return header, view, _CRC.pack(crc32c(view, crc32c(header)))


def decode(raw: bytes | memoryview) -> Record | None:
    """Return the fields of a header; None where it is none."""
    if len(raw) < HEADER_BYTES:
        return None
    fields = bytes(raw[: _FIELDS.size])
    if not fields.startswith(MAGIC):
        return None
    (crc,) = _CRC.unpack_from(raw, _FIELDS.size)
    if crc32c(fields) != crc:
        return None
    _, version, flags, length, seq, name, shelf, expires_s = _FIELDS.unpack(fields)
    if version != VERSION:
        return None
    return Record(name, shelf, seq, expires_s, Flag(flags), length)


def frame_of(raw: bytes | memoryview, name: bytes, seq: int) -> memoryview:
    """Return the frame of a record's bytes; raises `BadRecord` where any of them differs."""
    record = decode(raw)
    if record is None:
        raise BadRecord("header")
    if (record.name, record.seq, record.size) != (name, seq, len(raw)):
        raise BadRecord("swapped" if record.size == len(raw) else "length")
    (crc,) = _CRC.unpack_from(raw, len(raw) - _CRC.size)
    checked = memoryview(raw)[: -_CRC.size]
    if crc32c(checked) != crc:
        raise BadRecord("frame")
    return checked[HEADER_BYTES:]


class Scan(NamedTuple):
    """What is in a segment."""

    found: list[tuple[int, Record]]
    """(offset, record) in order."""
    bad: int
    """Places where something else stands, skipped up to the next record."""
    end: int
    """Where the last good record ends."""


def scan(file: Readable) -> Scan:
    """Return the records of a segment by their headers; frames are checked when they are read."""
    size = file.size()
    found: list[tuple[int, Record]] = []
    at = end = bad = 0
    while at + record_bytes(0) <= size:
        record = decode(file.read(at, HEADER_BYTES))
        if record is not None and at + record.size <= size:
            found.append((at, record))
            at = end = at + record.size
            continue
        bad += 1
        at = next(_later(file, at + 1, size), size)
    return Scan(found, bad + (end < size and not bad), end)


def _later(file: Readable, at: int, size: int) -> Iterator[int]:
    """Yield where whole records begin from an offset on."""
    while at + record_bytes(0) <= size:
        window = file.read(at, _SEARCH_BYTES)
        place = window.find(MAGIC)
        while place >= 0:
            record = decode(file.read(at + place, HEADER_BYTES))
            if record is not None and at + place + record.size <= size:
                yield at + place
            place = window.find(MAGIC, place + 1)
        at += max(len(window) - len(MAGIC) + 1, 1)
