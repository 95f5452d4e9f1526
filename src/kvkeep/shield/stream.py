"""Files sealed in chunks, any stretch of which opens alone: no chunk can be moved or left out.

    magic 4 | suite 1 | zero 3 | chunk bytes 4 | plain bytes 8 | file id 16 | commitment 32
    chunk: ciphertext | tag 16, one after another

Little-endian. Each file has a key of its own, a nonce is a chunk's number and whether it is the
last; name and header are authenticated with every chunk.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvkeep.errors import SealError
from kvkeep.shield.envelope import KEY_BYTES, Secret, model_material
from kvkeep.shield.frame import TAG_BYTES, Suite

MAGIC: Final = b"KVW1"
CHUNK_BYTES: Final = 256 << 10
FILE_ID_BYTES: Final = 16

_HEADER: Final = struct.Struct("<4sB3xIQ16s32s")
_NONCE: Final = struct.Struct("<QI")
HEADER_BYTES: Final = _HEADER.size


class StreamHeader(NamedTuple):
    """What a sealed file says of itself; believed once a chunk opens with it."""

    chunk_bytes: int
    plain_bytes: int
    file_id: bytes
    commitment: bytes

    def pack(self) -> bytes:
        """Return the header's bytes."""
        return _HEADER.pack(MAGIC, Suite.AES_256_GCM, *self)

    @property
    def chunks(self) -> int:
        """Return how many chunks there are; an empty file has one."""
        return max(1, -(-self.plain_bytes // self.chunk_bytes))

    @property
    def sealed_bytes(self) -> int:
        """Return the length of the whole file."""
        return HEADER_BYTES + self.plain_bytes + self.chunks * TAG_BYTES


class SealedFile:
    """A sealed file, opened a stretch at a time into memory; several threads may read."""

    def __init__(self, path: Path, name: str, file_id: bytes, model_key: Secret) -> None:
        """`name`, `file_id`: as the folder's manifest has them.

        Raises `SealError` where the file is not the one that was sealed under them, `OSError`.
        """
        self.path = path
        self._header = look(path, file_id)
        material = model_material(model_key, b"file" + file_id)
        if not hmac.compare_digest(self._header.commitment, material[KEY_BYTES:]):
            raise SealError("it is sealed under another key than its folder's")
        self._cipher = AESGCM(material[:KEY_BYTES])
        self._bound = _bound(self._header, name)

    @property
    def plain_bytes(self) -> int:
        """Return the length of what was sealed."""
        return self._header.plain_bytes

    def read(self, begin: int, size: int) -> memoryview:
        """Return a stretch of what was sealed, in memory of its own, writable.

        Raises `SealError` where a chunk of it was changed, `OSError` where it can't be read.
        """
        header = self._header
        if begin < 0 or size < 0 or begin + size > header.plain_bytes:
            raise SealError("it ends before what is to be read of it")
        chunk = header.chunk_bytes
        first, last = begin // chunk, max(begin + size - 1, begin) // chunk
        start = first * chunk
        plain = np.empty(min((last + 1) * chunk, header.plain_bytes) - start, np.uint8).data
        with self.path.open("rb") as file:
            for number in range(first, min(last + 1, header.chunks)):
                at = number * chunk - start
                self._open(file, number, plain[at : at + chunk])
        return plain[begin - start : begin - start + size]

    def _open(self, file: BinaryIO, number: int, into: memoryview) -> None:
        header = self._header
        file.seek(HEADER_BYTES + number * (header.chunk_bytes + TAG_BYTES))
        sealed = file.read(len(into) + TAG_BYTES)
        nonce = _NONCE.pack(number, number == header.chunks - 1)
        try:
            self._cipher.decrypt_into(nonce, sealed, self._bound, into)
        except (InvalidTag, ValueError):  # a file cut short since gives too few bytes
            into[:] = bytes(len(into))
            raise SealError("its bytes were changed") from None


def look(path: Path, file_id: bytes) -> StreamHeader:
    """Return the header of a file that should be the one of this id; asks for no key.

    Raises `SealError`, `OSError`.
    """
    with path.open("rb") as file:
        return _checked(file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size, file_id)


def seal_file(
    source: Path, target: Path, name: str, model_key: Secret, chunk_bytes: int = CHUNK_BYTES
) -> bytes:
    """Write a file's bytes to a new file, sealed; returns its id. Raises `OSError`."""
    file_id = os.urandom(FILE_ID_BYTES)
    material = model_material(model_key, b"file" + file_id)
    cipher = AESGCM(material[:KEY_BYTES])
    with source.open("rb") as reader, _new_file(target) as write:
        size = os.fstat(reader.fileno()).st_size
        header = StreamHeader(chunk_bytes, size, file_id, material[KEY_BYTES:])
        bound = _bound(header, name)
        write(header.pack())
        for number in range(header.chunks):
            plain = reader.read(min(chunk_bytes, size - number * chunk_bytes))
            nonce = _NONCE.pack(number, number == header.chunks - 1)
            write(cipher.encrypt(nonce, plain, bound))
    return file_id


@contextmanager
def _new_file(path: Path) -> Iterator[Callable[[bytes], int]]:
    with path.open("xb") as file:
        yield file.write
        file.flush()
        os.fsync(file.fileno())


def _checked(raw: bytes, length: int, file_id: bytes) -> StreamHeader:
    """Return the header of a file of this length; raises `SealError`."""
    if len(raw) < HEADER_BYTES:
        raise SealError("it was cut short")
    magic, suite, *fields = _HEADER.unpack(raw)
    header = StreamHeader(*fields)
    if magic != MAGIC or suite != Suite.AES_256_GCM or not header.chunk_bytes:
        raise SealError("it is no sealed file of this version")
    if header.file_id != file_id:
        raise SealError("it is another file than the manifest names")
    if length != header.sealed_bytes:
        raise SealError("it was cut short" if length < header.sealed_bytes else "it was added to")
    if header.pack() != raw:
        raise SealError("its header was changed")
    return header


def _bound(header: StreamHeader, name: str) -> bytes:
    """Return what is authenticated with every chunk."""
    return b"kvs1|file" + header.pack() + name.encode()
