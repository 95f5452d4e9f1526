"""Frames that are checked and not secret: what a tier holds under `--shield off`.

A frame begins with a digest of what it is bound to and a checksum per layer, each seeded by that
digest: a frame of another page is refused before anything of it is given out. Whoever reads the
tier reads the pages.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
from crc32c import crc32c

from kvkeep.errors import SealError
from kvkeep.sealing import NAME_BYTES, SHELF_BYTES, Opened, SealContext
from kvkeep.shield.frame import SLICE_BYTES

_DIGEST_BYTES: Final = 32
_CRC: Final = struct.Struct("<I")


class PlainSealer:
    """Checksums in place of a seal; a `TierSealer`."""

    name = "off"

    def name_of(self, context: SealContext) -> bytes:
        """Return a digest of what the page is bound to."""
        return _digest(context, NAME_BYTES, b"kvkeep-name")

    def shelf_of(self, owner: str) -> bytes:
        """Return a digest of the owner's name."""
        digest = hashlib.blake2b(owner.encode(), digest_size=SHELF_BYTES, person=b"kvkeep-shelf")
        return digest.digest()

    def frame_bytes(self, layer_bytes: Sequence[int]) -> int:
        """Return how long a frame of such pages is."""
        return _DIGEST_BYTES + len(layer_bytes) * _CRC.size + sum(layer_bytes)

    def seal(
        self,
        context: SealContext,
        page: bytes | memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> memoryview:
        """Return a page's layers behind their checksums."""
        bound = _digest(context, _DIGEST_BYTES, b"kvkeep-frame")
        seed, plain = crc32c(bound), memoryview(page)
        sums = b"".join(_CRC.pack(crc32c(plain[at], seed)) for at in _places(layer_bytes))
        frame = np.empty(self.frame_bytes(layer_bytes), np.uint8).data if into is None else into
        begin = _DIGEST_BYTES + len(sums)
        frame[:_DIGEST_BYTES] = bound
        frame[_DIGEST_BYTES:begin] = sums
        frame[begin:] = plain
        return frame

    def expecting(
        self, frames: Sequence[tuple[SealContext, memoryview]]
    ) -> AbstractContextManager[None]:
        """Get no keys: there are none."""
        return nullcontext()

    def open(
        self,
        context: SealContext,
        frame: memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> Opened:
        """Yield the layers in order, small ones together; `SealError`: a byte differs."""
        if len(frame) != self.frame_bytes(layer_bytes):
            raise SealError("a frame has another length than its page")
        bound = _digest(context, _DIGEST_BYTES, b"kvkeep-frame")
        if frame[:_DIGEST_BYTES] != bound:
            raise SealError("a frame is another page's")
        seed = crc32c(bound)
        sums = _CRC.iter_unpack(frame[_DIGEST_BYTES:][: len(layer_bytes) * _CRC.size])
        page = frame[_DIGEST_BYTES + len(layer_bytes) * _CRC.size :]
        plain = np.empty(len(page), np.uint8).data if into is None else into
        given, last = 0, len(layer_bytes) - 1
        for layer, (at, (crc,)) in enumerate(zip(_places(layer_bytes), sums, strict=True)):
            if crc32c(page[at], seed) != crc:
                raise SealError("a layer of a frame was changed")
            if at.stop - given >= SLICE_BYTES or layer == last:
                plain[given : at.stop] = page[given : at.stop]
                yield plain[given : at.stop]
                given = at.stop
        return False


def _places(layer_bytes: Sequence[int]) -> Iterator[slice]:
    """Yield where each layer of a page is in it."""
    at = 0
    for size in layer_bytes:
        yield slice(at, at + size)
        at += size


def _digest(context: SealContext, size: int, person: bytes) -> bytes:
    return hashlib.blake2b(context.associated_data(), digest_size=size, person=person).digest()
