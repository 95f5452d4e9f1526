"""Weight files as stretches of bytes: read as they lie, or opened from sealed ones into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from kvkeep.errors import CheckpointError, SealError
from kvkeep.shield.folder import Unwrap, check_folder, open_folder
from kvkeep.shield.stream import SealedFile


class Shard(Protocol):
    """One weight file."""

    @property
    def file(self) -> Path:
        """Return the file, as the checkpoint's index calls it."""

    def size(self) -> int:
        """Return its bytes."""

    def read(self, begin: int, size: int) -> bytes | memoryview:
        """Return a stretch of it; several threads may read. Raises `CheckpointError`."""


class PlainShard:
    """A file in the clear."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def size(self) -> int:
        """Return its bytes."""
        return self.file.stat().st_size

    def read(self, begin: int, size: int) -> bytes:
        """Return a stretch of it."""
        with self.file.open("rb") as stream:
            return os.pread(stream.fileno(), size, begin)


class SealedShard:
    """A sealed file; what it held is in memory alone."""

    def __init__(self, file: Path, sealed: SealedFile) -> None:
        self.file = file
        self._sealed = sealed

    def size(self) -> int:
        """Return the bytes that were sealed."""
        return self._sealed.plain_bytes

    def read(self, begin: int, size: int) -> memoryview:
        """Return a stretch of it in memory of its own, writable."""
        try:
            return self._sealed.read(begin, size)
        except SealError as error:
            raise CheckpointError(f"{self._sealed.path}: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{self._sealed.path} can't be read: {error}") from error


def open_shards(folder: Path, unwrap: Unwrap) -> tuple[Shard, ...]:
    """Return the weight files of a sealed checkpoint.

    Raises `CheckpointError` where anything differs from what was sealed, and what `unwrap` raises.
    """
    try:
        files = open_folder(folder, unwrap)
    except SealError as error:
        raise CheckpointError(f"{folder} does not open: {error}") from None
    return tuple(SealedShard(folder / name, file) for name, file in files)


def check_sealed(folder: Path) -> None:
    """Raise `CheckpointError` for what is wrong with a sealed checkpoint and told without a key."""
    try:
        check_folder(folder)
    except SealError as error:
        raise CheckpointError(f"{folder} is sealed and not whole: {error}") from None
