"""What a level below memory asks of the place where its frames lie: files, or a service."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Protocol


class Place(NamedTuple):
    """Where a frame is; `seq` tells it from others of its name, wherever it is moved."""

    segment: int
    offset: int
    length: int
    seq: int


class Found(NamedTuple):
    """A page that outlived a restart."""

    name: bytes
    shelf: bytes
    place: Place
    expires_s: float


class Moved(Exception):
    """A page is no longer where it was."""


class Away(OSError):
    """The place can't be reached at the moment; what lies there stays."""


class FrameAccess(Protocol):
    """Frames by name; one thread appends, drops and purges, `read` may run in others."""

    def append(
        self, name: bytes, shelf: bytes, expires_s: float, frame: bytes | memoryview
    ) -> Place:
        """Write a page; one of its name that was there before is gone. Raises `OSError`."""

    def drop(self, name: bytes, seq: int) -> None:
        """Give up a page, if it is the one meant; raises `OSError`."""

    def purge(self, shelf: bytes) -> int:
        """Give up a shelf; return how many pages. Raises `OSError` where some may be left."""

    def read(self, name: bytes, place: Place, into: memoryview | None = None) -> memoryview:
        """Return a page's frame; raises `OSError`, `BadRecord`, or `Moved`.

        It may lie in `into`, memory of a record's size.
        """


class Frames(FrameAccess, Protocol):
    """A place of frames as the thread that writes keeps it."""

    unsynced_bytes: int
    errors: Counter[str]
    """Bad places found, by kind."""

    def open(self, now: float) -> list[Found]:
        """Return the pages that hold at `now`, the oldest first; raises `OSError`."""

    def sync(self) -> None:
        """Make what was appended outlive the machine's power; raises `OSError`."""

    def unread(self) -> bool:
        """Tell whether pages could not be listed when they were to be, and can be by now."""

    def close(self) -> None:
        """Let go of it."""
