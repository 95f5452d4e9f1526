"""How a sealed page's bytes are arranged: a header in the clear, then slices of ciphertext.

    magic 4 | suite 1 | flags 1 | zero 2 | page id 16 | epoch 4 | generation 4 | commitment 32
    slice: ciphertext | tag 16, one after another

Numbers are little-endian. Small layers are sealed several at a time, large ones in slices: short
messages waste time, and a call of the cipher holds the interpreter's lock.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvkeep.errors import SealError

MAGIC = b"KVS1"
HEADER_BYTES = 64
TAG_BYTES = 16
PAGE_ID_BYTES = 16
COMMITMENT_BYTES = 32
SLICE_BYTES = 256 << 10
"""Most bytes of one call of the cipher; layers are sealed together up to it."""

_HEADER = struct.Struct("<4sBBH16sII32s")
_NONCE = struct.Struct("<III")
_PLACE = struct.Struct("<IIII")


class Suite(IntEnum):
    """The cipher of a frame."""

    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2


_SUITES = {int(suite): suite for suite in Suite}


class Header(NamedTuple):
    """What a frame says of its own key; none of it is believed before the commitment holds."""

    suite: Suite
    page_id: bytes
    epoch: int
    generation: int
    """How often the page was sealed anew."""
    commitment: bytes


class Slice(NamedTuple):
    """One message of the cipher: layers [first, last), or a stretch of one."""

    nonce: bytes
    """u32 first layer, u32 part, u32 slice of the part: no two slices of a page have the same."""
    place: bytes
    """What of the slice is authenticated beside the page: part, slice, first and last layer."""
    plain: slice
    """Where its bytes are in the page."""
    sealed: slice
    """Where its ciphertext and tag are in the frame."""
    whole: bool
    """Whether no layer goes on after it."""


@dataclass(frozen=True, slots=True)
class FramePlan:
    """Where everything of a page with layers of given sizes lies in its frame."""

    slices: tuple[Slice, ...]
    sizes: bytes
    """The layers' number and sizes, as they are authenticated."""
    plain_bytes: int
    """Of the page before sealing."""
    frame_bytes: int
    """Of every frame of this plan."""


def plan_frame(layer_bytes: Sequence[int]) -> FramePlan:
    """Return the plan for layers of these sizes; raises `SealError` where there is nothing."""
    if not layer_bytes or min(layer_bytes) <= 0:
        raise SealError("a page to be sealed needs layers, none of them empty")
    starts = list(itertools.accumulate(layer_bytes, initial=0))
    slices: list[Slice] = []
    at = HEADER_BYTES
    for part, (first, last) in enumerate(_parts(layer_bytes)):
        begin, end = starts[first], starts[last]
        for number, start in enumerate(range(begin, end, SLICE_BYTES)):
            stop = min(start + SLICE_BYTES, end)
            sealed = slice(at, at + stop - start + TAG_BYTES)
            slices.append(
                Slice(
                    nonce=_NONCE.pack(first, part, number),
                    place=_PLACE.pack(part, number, first, last),
                    plain=slice(start, stop),
                    sealed=sealed,
                    whole=stop == end,
                )
            )
            at = sealed.stop
    sizes = struct.pack(f"<{len(layer_bytes) + 1}I", len(layer_bytes), *layer_bytes)
    return FramePlan(tuple(slices), sizes, starts[-1], at)


def header_of(suite: Suite, page_id: bytes, epoch: int, commitment: bytes) -> bytes:
    """Return the 64 bytes that a frame begins with, of a page that was sealed once."""
    return _HEADER.pack(MAGIC, suite, 0, 0, page_id, epoch, 0, commitment)


def read_header(frame: memoryview, plan: FramePlan) -> Header:
    """Return the header of a plan's frame; raises `SealError` where these bytes are none."""
    if len(frame) != plan.frame_bytes:
        raise SealError("a frame's length is another than its form's")
    magic, number, flags, zero, page_id, epoch, generation, commitment = _HEADER.unpack_from(frame)
    suite = _SUITES.get(number)
    if magic != MAGIC or suite is None or flags or zero:
        raise SealError("a frame's header is of another form or version")
    return Header(suite, page_id, epoch, generation, commitment)


def peek(raw: memoryview) -> Header | None:
    """Return what a frame's beginning says of its key; None where it is no sealed one."""
    if len(raw) < HEADER_BYTES:
        return None
    magic, number, _, _, page_id, epoch, generation, commitment = _HEADER.unpack_from(raw)
    suite = _SUITES.get(number)
    if magic != MAGIC or suite is None:
        return None
    return Header(suite, page_id, epoch, generation, commitment)


def epoch_of(raw: bytes) -> int | None:
    """Return the key epoch that the beginning of a frame names; None where it is no sealed one."""
    if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
        return None
    return int(_HEADER.unpack_from(raw)[5])


def _parts(layer_bytes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield runs [first, last) of layers: one large layer, or small ones up to a slice's size."""
    first, size = 0, 0
    for layer, length in enumerate(layer_bytes):
        if size and size + length > SLICE_BYTES:
            yield first, layer
            first, size = layer, 0
        size += length
    yield first, len(layer_bytes)
