"""Tiles in memory under `--shield tile`: labels in place of tokens, and a cipher for tiles.

Both keys are random at each start and lie in secret memory. The cipher's library copies its key to
ordinary memory while a call lasts, and clears it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from kvkeep.shield.secret import RegionKind, SecretRegion
from kvkeep.types import PAGE_TOKENS, Int32Array

LABEL_BYTES: Final = 32
TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
FIRST_COUNT: Final = 0xA5A5 << 48
"""Where nonces begin to be counted: no bit that flips makes a count a plain tile's, which is 0."""
WORK_BYTES: Final = 1 << 20
"""Ciphertext gathered at a time, with its tags behind each tile."""

Bytes = NDArray[np.uint8]
Counts = NDArray[np.uint64]


class TileKeys:
    """The two keys of a start."""

    def __init__(self, *, secret: bool = True) -> None:
        self._region = SecretRegion(2, secret=secret)
        self._label, self._tile = self._region.random(), self._region.random()

    @property
    def kind(self) -> RegionKind:
        """Return how the keys are kept from others."""
        return self._region.kind

    @property
    def label(self) -> memoryview:
        """Return the key of labels."""
        return self._region.view(self._label)

    @property
    def tile(self) -> memoryview:
        """Return the key of tiles."""
        return self._region.view(self._tile)


class PageLabels:
    """Keyed digests of pages' tokens, each bound to all before it; see `cache.radix.PageKeys`."""

    page_bytes = LABEL_BYTES
    rows = False

    def __init__(self, keys: TileKeys) -> None:
        self._keys = keys

    def of(self, tokens: Int32Array | Sequence[int], before: bytes = b"") -> bytes:
        """Return the labels of pages, one after the other, the last perhaps of its first rows."""
        ids, labels, key = np.ascontiguousarray(tokens, dtype="<i4"), bytearray(), self._keys.label
        for begin in range(0, len(ids), PAGE_TOKENS):
            digest = hashlib.blake2b(
                before, digest_size=LABEL_BYTES, key=key, person=b"kvkeep-label"
            )
            digest.update(ids[begin : begin + PAGE_TOKENS].data)
            before = digest.digest()
            labels += before
        return bytes(labels)


class TileCipher:
    """AES-256-GCM, tile by tile: a call of the library is one tile, well below 256 KiB.

    A nonce is a number that is counted up for every tile that is sealed, so none comes twice under
    a key that one start alone has.
    """

    tag_bytes = TAG_BYTES

    def __init__(self, keys: TileKeys) -> None:
        self._keys = keys
        self._next = FIRST_COUNT
        self._work: dict[int, tuple[Bytes, list[memoryview]]] = {}

    def seal(
        self, plain: Sequence[memoryview], tiles: Bytes, tags: Bytes, numbers: Int32Array
    ) -> Counts:
        """Write plain tiles sealed to `tiles` [N, bytes] and `tags` [N, 16] at `numbers` [n].

        The plain ones may lie there. Returns their nonces' counts [n].
        """
        size, cipher = tiles.shape[1], AESGCM(self._keys.tile)
        counts = np.arange(self._next, self._next + len(numbers), dtype=np.uint64)
        self._next += len(numbers)
        nonces, (work, rows) = _nonces(counts), self._room(size)
        for begin in range(0, len(numbers), len(rows)):
            some = numbers[begin : begin + len(rows)]
            for i in range(len(some)):
                cipher.encrypt_into(nonces[begin + i], plain[begin + i], None, rows[i])
            tiles[some] = work[: len(some), :size]
            tags[some] = work[: len(some), size:]
        return counts

    def open(
        self,
        tiles: Bytes,
        tags: Bytes,
        counts: Counts,
        numbers: Int32Array,
        into: Sequence[memoryview],
    ) -> list[int]:
        """Open the tiles at `numbers` [n] into memory for each; return which were changed.

        Those are zeros.
        """
        size, cipher, broken = tiles.shape[1], AESGCM(self._keys.tile), []
        nonces, (work, rows) = _nonces(counts[numbers]), self._room(size)
        for begin in range(0, len(numbers), len(rows)):
            some = numbers[begin : begin + len(rows)]
            np.take(tiles, some, 0, work[: len(some), :size], "clip")
            work[: len(some), size:] = tags[some]
            for i in range(len(some)):
                try:
                    cipher.decrypt_into(nonces[begin + i], rows[i], None, into[begin + i])
                except InvalidTag:
                    into[begin + i][:] = bytes(size)
                    broken.append(begin + i)
        return broken

    def _room(self, size: int) -> tuple[Bytes, list[memoryview]]:
        """Return memory [m, size + tag] for ciphertext, and each row of it."""
        found = self._work.get(size)
        if found is None:
            rows = max(1, WORK_BYTES // size)
            work = np.zeros((rows, size + TAG_BYTES), np.uint8)
            found = self._work[size] = work, [row.data for row in work]
        return found


def _nonces(counts: Counts) -> list[bytes]:
    raw = np.zeros((len(counts), NONCE_BYTES), np.uint8)
    raw[:, NONCE_BYTES - counts.itemsize :] = counts[:, None].view(np.uint8)
    whole = raw.tobytes()
    return [whole[at : at + NONCE_BYTES] for at in range(0, len(whole), NONCE_BYTES)]
