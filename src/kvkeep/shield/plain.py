"""Frames that are checked and not secret: what a tier holds under `--shield off`.

A frame begins with a digest of what it is bound to and a checksum per layer, each seeded by that
digest: a frame of another page is refused before anything of it is given out. Whoever reads the
tier reads the pages.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Final

import google_crc32c

from kvkeep.errors import SealError
from kvkeep.sealing import NAME_BYTES, SHELF_BYTES, Opened, SealContext

_DIGEST_BYTES: Final = 32
_CRC: Final = struct.Struct("<I")


class PlainSealer:
    """Checksums in place of a seal; a `PageSealer`."""

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
        seed = google_crc32c.value(bound)
        layers = _cut(memoryview(page), layer_bytes)
        sums = (_CRC.pack(google_crc32c.extend(seed, layer)) for layer in layers)
        frame = memoryview(b"".join((bound, *sums, page)))
        if into is None:
            return frame
        into[:] = frame
        return into

    def open(
        self,
        context: SealContext,
        frame: memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> Opened:
        """Yield the layers in order; raises `SealError` where a byte differs."""
        if len(frame) != self.frame_bytes(layer_bytes):
            raise SealError("a frame has another length than its page")
        bound = _digest(context, _DIGEST_BYTES, b"kvkeep-frame")
        if frame[:_DIGEST_BYTES] != bound:
            raise SealError("a frame is another page's")
        seed = google_crc32c.value(bound)
        page = frame[_DIGEST_BYTES + len(layer_bytes) * _CRC.size :]
        at = 0
        for layer, data in enumerate(_cut(page, layer_bytes)):
            (crc,) = _CRC.unpack_from(frame, _DIGEST_BYTES + layer * _CRC.size)
            if google_crc32c.extend(seed, data) != crc:
                raise SealError("a layer of a frame was changed")
            if into is not None:
                into[at : at + len(data)] = data
            yield memoryview(data) if into is None else into[at : at + len(data)]
            at += len(data)
        return False


def _cut(page: memoryview, layer_bytes: Sequence[int]) -> Iterator[bytes]:
    """Yield the layers of a page; the checksum takes nothing but bytes."""
    at = 0
    for size in layer_bytes:
        yield bytes(page[at : at + size])
        at += size


def _digest(context: SealContext, size: int, person: bytes) -> bytes:
    return hashlib.blake2b(context.associated_data(), digest_size=size, person=person).digest()
