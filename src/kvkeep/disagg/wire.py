"""Frames between two workers: a header that proves itself, then so many bytes and no more.

    magic 2 | version 1 | kind 1 | layer 2 | layers 2 | request 4 | first page 4 | pages 4
    payload bytes 4 | payload checksum 4 | tag 16 | header checksum 4

Numbers are little-endian, checksums crc32c. A header is believed once its checksum holds, and
nothing is allocated for a payload before that. A control frame's payload is a tagged record of
msgpack under a checksum. Pages' payload is what a `PageSealer` made, which proves itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from crc32c import crc32c

from kvkeep.errors import WireError

VERSION: Final = 3
MAGIC: Final = b"KW"
HEADER_BYTES: Final = 48
TAG_BYTES: Final = 16
CONTROL_BYTES: Final = 64 << 10
"""Most bytes of a control frame's payload."""
PAGES_BYTES: Final = 16 << 20
"""Most bytes of a frame of pages."""
DESCRIPTOR_BYTES: Final = 1 << 20
"""A frame of pages is sent once it is so large, or nothing more is to come at the moment."""
NO_TAG: Final = bytes(TAG_BYTES)

_HEADER = struct.Struct("<2sBBHHIIIII16sI")
_SUM = struct.Struct("<I")
_Name = Annotated[str, msgspec.Meta(max_length=256)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Kind(IntEnum):
    """What a frame carries."""

    CONTROL = 1
    PAGES = 2
    ROWS = 3
    """Queries of rows that attend to pages held for them, or the states they have gathered."""
    OPEN = 4
    """Rows of a prompt behind its last whole pages, as they were computed."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first frame of either side: what both must have in common."""

    model: _Name
    """The model's digest."""
    forms: dict[_Name, _Name]
    """Digest of how pages' bytes are arranged, by codec."""
    sealer: _Name
    """What seals pages, and by which store's keys."""
    window_bytes: _Count
    """What may be under way to this side and not yet taken."""


class Want(msgspec.Struct, frozen=True, tag=True):
    """Ask for pages [first_page, end_page) of a request's prompt."""

    request: _Count
    """What the asker calls it on this connection."""
    id: _Name
    first_page: _Count
    end_page: _Count
    chain: Annotated[bytes, msgspec.Meta(max_length=64)]
    """Hash of the chain up to `first_page`: the pages that the asker holds."""
    tag: Annotated[bytes, msgspec.Meta(min_length=TAG_BYTES, max_length=TAG_BYTES)]


class WantRows(msgspec.Struct, frozen=True, tag=True):
    """Ask for the rows behind the last whole pages of a request's prompt."""

    request: _Count
    id: _Name
    chain: Annotated[bytes, msgspec.Meta(max_length=64)]
    """Hash of the chain before them."""
    tag: Annotated[bytes, msgspec.Meta(min_length=TAG_BYTES, max_length=TAG_BYTES)]


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Nothing comes of a request from a page on; of rows, nothing at all."""

    request: _Count
    page: _Count


class Drop(msgspec.Struct, frozen=True, tag=True):
    """The asker wants nothing more of a request."""

    request: _Count


class Hold(msgspec.Struct, frozen=True, tag=True):
    """Ask for a request's first pages to be held, and attended to where they lie."""

    request: _Count
    id: _Name
    pages: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
    chain: Annotated[bytes, msgspec.Meta(max_length=64)]
    """Hash of the chain up to their end."""
    tag: Annotated[bytes, msgspec.Meta(min_length=TAG_BYTES, max_length=TAG_BYTES)]


class Holds(msgspec.Struct, frozen=True, tag=True):
    """A request's first pages are held from now on."""

    request: _Count


class Credit(msgspec.Struct, frozen=True, tag=True):
    """So many bytes of pages were taken, and as many may follow."""

    count: _Count


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The other side is there."""


class Mapped(msgspec.Struct, frozen=True, tag=True):
    """A frame of pages whose payload lies in shared memory."""

    ring: _Name
    num_bytes: Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]
    at: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    header: Annotated[bytes, msgspec.Meta(min_length=HEADER_BYTES, max_length=HEADER_BYTES)]


class Freed(msgspec.Struct, frozen=True, tag=True):
    """The oldest frame in shared memory was read."""


Control = Hello | Want | WantRows | Hold | Holds | Lost | Drop | Credit | Beat | Mapped | Freed

_ENCODER: Final = msgspec.msgpack.Encoder()
_CONTROL: Final[msgspec.msgpack.Decoder[Control]] = msgspec.msgpack.Decoder(Control)


class Block(NamedTuple):
    """Layers [layer, layer + layers) of pages [first_page, first_page + pages) of a request."""

    request: int
    layer: int
    layers: int
    first_page: int
    pages: int
    tag: bytes


class Frame(NamedTuple):
    """One frame; `block` says what of a request pages are, and is None of control frames."""

    block: Block | None
    payload: memoryview
    kind: Kind = Kind.PAGES
    """Of a frame that has a block."""

    def control(self) -> Control:
        """Return a control frame's record; raises `WireError`."""
        if self.block is not None:
            raise WireError("a worker sent pages where a record was due")
        try:
            return _CONTROL.decode(self.payload)
        except (msgspec.MsgspecError, ValueError) as error:
            raise WireError(f"a control frame can't be read: {type(error).__name__}") from None


def control_bytes(record: Control) -> bytes:
    """Return a control frame's bytes."""
    payload = _ENCODER.encode(record)
    return _header(Kind.CONTROL, Block(0, 0, 0, 0, 0, NO_TAG), payload) + payload


def pages_header(
    block: Block, payload: bytes | memoryview, kind: Literal[Kind.PAGES, Kind.OPEN] = Kind.PAGES
) -> bytes:
    """Return the header of a frame of pages, or of rows behind the last whole ones.

    Raises `WireError` where these are too many.
    """
    return _header(kind, block, payload)


def rows_header(block: Block, payload: bytes | memoryview) -> bytes:
    """Return the header of a frame of rows: `pages` rows of a layer, in turn `first_page`.

    Raises `WireError` where these are too many.
    """
    return _header(Kind.ROWS, block, payload)


def check_hello(own: Hello, other: Hello) -> None:
    """Raise `WireError`, naming both values, where two workers do not fit together."""
    for name in ("model", "sealer"):
        mine, theirs = getattr(own, name), getattr(other, name)
        if mine != theirs:
            raise WireError(f"{name}: this worker has {mine!r} and the other {theirs!r}")
    if own.forms != other.forms:
        mine, theirs = (sorted(one.forms.items()) for one in (own, other))
        raise WireError(f"codec: this worker stores {mine} and the other {theirs}")


class FrameParser:
    """Finds frames in bytes that arrive in any pieces.

    Whatever the bytes are, what comes out is frames or a `WireError`; after one it takes nothing
    more. It holds a header, and a payload once its header is proven.
    """

    def __init__(self, pages_bytes: int = PAGES_BYTES) -> None:
        """`pages_bytes`: most bytes of a frame of pages."""
        self._caps = {
            Kind.CONTROL: CONTROL_BYTES,
            Kind.PAGES: pages_bytes,
            Kind.ROWS: pages_bytes,
            Kind.OPEN: pages_bytes,
        }
        self._head = bytearray()
        self._begun: _Begun | None = None
        self._failed = False

    @property
    def held_bytes(self) -> int:
        """Return the memory allocated for a frame that is not whole yet."""
        return len(self._head) + (0 if self._begun is None else len(self._begun.payload))

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """Yield the frames that these bytes complete; take them all before the next call.

        Raises `WireError`.
        """
        if self._failed:
            raise WireError("nothing is read after bytes that were no frame")
        rest = memoryview(data)
        while rest:
            rest = self._take(rest)
            if self._begun is not None and self._begun.missing == 0:
                yield self._end(self._begun)

    def _take(self, data: memoryview) -> memoryview:
        """Take what belongs to the frame that was begun; return the rest."""
        if self._begun is None:
            part = data[: HEADER_BYTES - len(self._head)]
            self._head += part
            if len(self._head) == HEADER_BYTES:
                self._begun = self._prove(bytes(self._head))
                self._head.clear()
            return data[len(part) :]
        begun = self._begun
        part = data[: begun.missing]
        at = len(begun.payload) - begun.missing
        begun.payload[at : at + len(part)] = part
        begun.missing -= len(part)
        return data[len(part) :]

    def _prove(self, raw: bytes) -> _Begun:
        """Return the frame that a header begins."""
        fields = _HEADER.unpack(raw)
        (
            magic,
            version,
            number,
            layer,
            layers,
            request,
            first,
            pages,
            size,
            payload_sum,
            tag,
            own,
        ) = fields
        if magic != MAGIC:
            raise self._fail("what came is no frame")
        if version != VERSION:
            raise self._fail(f"version: this worker speaks {VERSION} and the other {version}")
        if own != crc32c(raw[: -_SUM.size]):
            raise self._fail("a frame's header was changed")
        if number not in self._caps:
            raise self._fail(f"kind: {number} is no kind of frame")
        kind = Kind(number)
        if size > self._caps[kind]:
            raise self._fail(f"payload: {size} bytes; at most {self._caps[kind]} are taken")
        if kind is Kind.CONTROL:
            return _Begun(None, kind, payload_sum, size)
        if not (layers and pages and size):
            raise self._fail("a frame of pages or rows holds none")
        block = Block(request, layer, layers, first, pages, tag)
        return _Begun(block, kind, payload_sum, size)

    def _end(self, begun: _Begun) -> Frame:
        self._begun = None
        if begun.block is None and crc32c(begun.payload) != begun.sum:
            raise self._fail("a control frame's payload was changed")
        return Frame(begun.block, memoryview(begun.payload).toreadonly(), begun.kind)

    def _fail(self, why: str) -> WireError:
        self._failed = True
        return WireError(why)


class _Begun:
    """A frame whose header is proven."""

    __slots__ = ("block", "kind", "missing", "payload", "sum")

    def __init__(self, block: Block | None, kind: Kind, payload_sum: int, size: int) -> None:
        self.block = block
        self.kind = kind
        self.sum = payload_sum
        self.payload = bytearray(size)
        self.missing = size


def _header(kind: Kind, block: Block, payload: bytes | memoryview) -> bytes:
    most = CONTROL_BYTES if kind is Kind.CONTROL else PAGES_BYTES
    if len(payload) > most:
        raise WireError(f"payload: {len(payload)} bytes; at most {most} fit in a frame")
    checked = crc32c(payload) if isinstance(payload, bytes) else 0
    raw = _HEADER.pack(
        MAGIC, VERSION, kind, block.layer, block.layers, block.request, block.first_page,
        block.pages, len(payload), checked if kind is Kind.CONTROL else 0, block.tag, 0,
    )  # fmt: skip
    return raw[: -_SUM.size] + _SUM.pack(crc32c(raw[: -_SUM.size]))
