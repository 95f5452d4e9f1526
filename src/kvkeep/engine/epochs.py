"""How many pages of a disk tier lie sealed under which epoch's key."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import BinaryIO

from kvkeep.cache.tier.records import HEADER_BYTES, Flag, Record, scan
from kvkeep.cache.tier.segments import SUFFIX
from kvkeep.errors import ConfigError
from kvkeep.shield.cipher import shelf_under
from kvkeep.shield.frame import HEADER_BYTES as FRAME_HEADER_BYTES
from kvkeep.shield.frame import epoch_of


def pages_by_epoch(folder: Path, shelf_key: bytes, owner: str) -> list[tuple[int, int]]:
    """Return (epoch, pages) of an owner, oldest first; a server may be using the folder.

    Raises `ConfigError` where the folder can't be read.
    """
    shelf = shelf_under(shelf_key, owner)
    newest: dict[bytes, tuple[int, int | None]] = {}
    try:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            with path.open("rb") as stream:
                file = _ReadOnly(stream)
                for at, record in scan(file).found:
                    if record.shelf == shelf and newest.get(record.name, (-1,))[0] <= record.seq:
                        newest[record.name] = (record.seq, _epoch(file, at, record))
    except OSError as error:
        raise ConfigError(f"tier: can't read {folder}: {error.strerror}") from None
    counts = Counter(epoch for _, epoch in newest.values() if epoch is not None)
    return sorted(counts.items())


class _ReadOnly:
    """A segment that is only looked at."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def size(self) -> int:
        """Return the length in bytes."""
        return self._stream.seek(0, 2)

    def read(self, offset: int, length: int) -> bytes:
        """Return so many bytes, fewer at the file's end."""
        self._stream.seek(offset)
        return self._stream.read(length)


def _epoch(file: _ReadOnly, at: int, record: Record) -> int | None:
    """Return the epoch of a record's frame; None where it notes that a page has gone."""
    if record.flags & Flag.GONE:
        return None
    return epoch_of(file.read(at + HEADER_BYTES, FRAME_HEADER_BYTES))
