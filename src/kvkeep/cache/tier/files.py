"""The few things a disk tier asks of a directory, so that tests can make each of them fail."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from kvkeep.errors import ConfigError

_LOCK = "lock"


class FileReads(Protocol):
    """What is read of an open file, by several threads at a time; all raise `OSError`."""

    def read(self, offset: int, length: int) -> bytes:
        """Return so many bytes, fewer at the file's end."""

    def fill(self, offset: int, into: memoryview) -> int:
        """Read into memory; return how many bytes, fewer at the file's end."""

    def size(self) -> int:
        """Return the length in bytes."""


class File(FileReads, Protocol):
    """An open file; all raise `OSError`. One thread writes."""

    def write(self, offset: int, data: memoryview) -> int:
        """Write there; return how many bytes were taken, perhaps fewer."""

    def truncate(self, size: int) -> None:
        """Cut the file off."""

    def sync(self) -> None:
        """Make what was written outlive the machine's power."""


class Files(Protocol):
    """A directory of segments that one process uses."""

    def names(self) -> list[str]:
        """Return the names of all files, in order."""

    def open(self, name: str) -> File:
        """Return a file, made where it is missing; it stays open as long as it is held."""

    def remove(self, name: str) -> None:
        """Delete a file; readers that hold it go on."""

    def sync(self) -> None:
        """Make what files there are outlive the machine's power."""

    def close(self) -> None:
        """Let another process have the directory."""


class OpenFile:
    """A file by its descriptor."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._fd)

    def write(self, offset: int, data: memoryview) -> int:
        """Write there; return how many bytes were taken."""
        return os.pwrite(self._fd, data, offset)

    def read(self, offset: int, length: int) -> bytes:
        """Return so many bytes; a read is taken up again where it was cut short."""
        parts = list(self._parts(offset, length))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fill(self, offset: int, into: memoryview) -> int:
        """Read into memory, taken up again where a read was cut short; return how many bytes."""
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def size(self) -> int:
        """Return the length in bytes."""
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        """Cut the file off."""
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Write what the system still holds."""
        os.fdatasync(self._fd)

    def _parts(self, offset: int, length: int) -> Iterator[bytes]:
        while length > 0:
            part = os.pread(self._fd, length, offset)
            if not part:
                return
            yield part
            offset, length = offset + len(part), length - len(part)


class Directory:
    """Files of one directory, locked."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` where it cannot be used, or another process does."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._lock = os.open(path / _LOCK, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"tier: can't write to {path}: {error.strerror}; name a directory of your own"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"tier: {path} is in use by another process; give each server a directory"
            ) from None
        self._path = path

    def names(self) -> list[str]:
        """Return the names of all files, in order."""
        return sorted(entry.name for entry in self._path.iterdir())

    def open(self, name: str) -> OpenFile:
        """Return a file, made where it is missing."""
        return OpenFile(self._path / name)

    def remove(self, name: str) -> None:
        """Delete a file."""
        (self._path / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Write the directory itself."""
        handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)
