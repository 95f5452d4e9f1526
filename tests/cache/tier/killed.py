"""A process that writes pages to a directory and kills itself at one of its operations.

`python -m tests.cache.tier.killed DIR NUMBER`: prints each page once it is written.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kvkeep.cache.tier.files import Directory, File, OpenFile
from kvkeep.cache.tier.segments import Segments

LIMIT = 1 << 20
FRAME_BYTES = 20_000
PAGES = 120


def frame_of(page: int) -> bytes:
    """Return what a page holds."""
    return (f"{page}.".encode() * FRAME_BYTES)[:FRAME_BYTES]


class Countdown:
    """Kills the process at its last tick."""

    def __init__(self, left: int) -> None:
        self._left = left

    def tick(self) -> None:
        """Count one operation."""
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalFile:
    """A file whose writes may be cut by the process's end."""

    def __init__(self, file: OpenFile, countdown: Countdown) -> None:
        self._file, self._countdown = file, countdown
        self.read, self.fill = file.read, file.fill
        self.size, self.truncate = file.size, file.truncate

    def write(self, offset: int, data: memoryview) -> int:
        """Write in two parts."""
        half = len(data) // 2
        taken = self._file.write(offset, data[:half]) if half else 0
        self._countdown.tick()
        return taken + self._file.write(offset + taken, data[half:])

    def sync(self) -> None:
        """Skip it: a killed process loses nothing that was written."""
        self._countdown.tick()


class MortalDirectory(Directory):
    """A directory of such files."""

    def __init__(self, path: Path, countdown: Countdown) -> None:
        super().__init__(path)
        self._countdown = countdown

    def open(self, name: str) -> File:  # type: ignore[override]
        """Return a file."""
        self._countdown.tick()
        return MortalFile(super().open(name), self._countdown)

    def remove(self, name: str) -> None:
        """Delete a file."""
        self._countdown.tick()
        super().remove(name)

    def sync(self) -> None:
        """Skip it."""
        self._countdown.tick()


def main(directory: str, number: str) -> None:
    """Write pages, and drop two of three."""
    files = MortalDirectory(Path(directory), Countdown(int(number)))
    segments = Segments(files, LIMIT)
    segments.open(0.0)
    for page in range(PAGES):
        place = segments.append(page.to_bytes(24, "big"), b"s" * 16, 0.0, frame_of(page))
        sys.stdout.write(f"wrote {page}\n")
        sys.stdout.flush()
        if page % 3:
            sys.stdout.write(f"dropping {page}\n")
            sys.stdout.flush()
            segments.drop(page.to_bytes(24, "big"), place.seq)


if __name__ == "__main__":
    main(*sys.argv[1:])
