"""What happens to pages off the engine's thread: sealing, writing, reading, opening.

Results wait as events until `poll` runs them on the engine's thread.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Final, NamedTuple

from kvkeep.cache.tier.files import Files
from kvkeep.cache.tier.records import BadRecord
from kvkeep.cache.tier.segments import Found, Moved, Place, Segments
from kvkeep.cache.tier.work import Workers, WriteQueue
from kvkeep.cache.tiers import Install
from kvkeep.errors import KeysUnavailable, SealError
from kvkeep.sealing import PageSealer, SealContext

SYNC_BYTES: Final = 8 << 20
SYNC_S: Final = 0.1
"""What was written is durable after so many bytes or so long."""
_WAIT_S: Final = 0.001

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Entry:
    """A page by its name; where it is."""

    name: bytes
    shelf: bytes
    expires_s: float
    """Unix time; 0: never."""
    in_memory: bool = False
    """Whether the memory level has room for it; its frame may still be on its way."""
    on_disk: bool = False
    """The same of the disk."""
    page: memoryview | None = None
    """Its layers one after another, copied and not yet sealed."""
    readers: int = 0
    """That are still to be handed parts of `page`."""
    frame: memoryview | None = None
    place: Place | None = None
    gone: bool = False

    @property
    def there(self) -> bool:
        """Tell whether its bytes can be had."""
        return self.page is not None or self.frame is not None or self.place is not None


class Sealed(NamedTuple):
    """What became of a page that was to be written."""

    frame: memoryview | None
    place: Place | None


class Reading(NamedTuple):
    """One page on its way up, and who hears of it."""

    entry: Entry
    context: SealContext
    layer_bytes: Sequence[int]
    place: Place | None
    install: Install
    done: Callable[[bool], None]
    level: str


class Failure(Enum):
    """Why a page could not be had."""

    MOVED = auto()
    """It lies elsewhere by now."""
    LOCKED = auto()
    """Nobody gives out its keys at the moment."""
    BROKEN = auto()


class Backroom:
    """The threads of a tier and what only they touch."""

    def __init__(
        self,
        sealer: PageSealer,
        files: Files | None,
        disk_bytes: int,
        moved: Callable[[bytes, Place | None, int], None],
        now: float,
    ) -> None:
        """Read the disk's index; `moved` hears of pages that lie elsewhere. Raises `OSError`."""
        self._sealer = sealer
        self._moved = moved
        self._events: deque[tuple[int, Callable[[], None]]] = deque()
        self._errors: Counter[str] = Counter()
        self._unsynced_s: float | None = None
        self._segments: Segments | None = None
        self.found: list[Found] = []
        """What outlived a restart."""
        if files is not None:
            self._segments = Segments(files, disk_bytes, self._post_move)
            self.found = self._segments.open(now)
        self.queue = WriteQueue()
        self._workers = Workers(self.queue, self._rest)

    # On the engine's thread

    def poll(self, most_bytes: int) -> None:
        """Run events until so many bytes were handed over; at least one."""
        while self._events and most_bytes > 0:
            size, event = self._events.popleft()
            most_bytes -= size
            event()

    def due(self) -> bool:
        """Tell whether events wait."""
        return bool(self._events)

    def errors(self) -> Counter[str]:
        """Return how often what went wrong."""
        return self._errors + (self._segments.errors if self._segments is not None else Counter())

    def seal(
        self,
        entry: Entry,
        context: SealContext,
        page: memoryview,
        layer_bytes: Sequence[int],
        stored: Callable[[Sealed], None],
    ) -> None:
        """Seal a page and write it where it has room on the disk."""
        job = partial(self._seal, entry, context, page, layer_bytes, stored)
        self.queue.put(entry.shelf, len(page), job)

    def open(
        self,
        reading: Reading,
        frame: memoryview | None,
        opened: Callable[[Reading, memoryview | None], None],
        failed: Callable[[Reading, Failure], None],
    ) -> None:
        """Open a page, read first where no frame is given; `failed` hears why."""
        self._workers.read(partial(self._open, reading, frame, opened, failed))

    def hand_over(
        self,
        reading: Reading,
        page: memoryview,
        opened: Callable[[Reading, memoryview | None], None],
    ) -> None:
        """Give out a page that is at hand as if it had been read."""
        reading.entry.readers += 1
        at = 0
        for layer, size in enumerate(reading.layer_bytes):
            self._post(size, partial(reading.install, layer, page[at : at + size]))
            at += size

        def end() -> None:
            reading.entry.readers -= 1
            opened(reading, None)

        self._post(0, end)

    def drop(self, name: bytes, place: Place) -> None:
        """Give up a page on the disk."""
        if self._segments is not None:
            self.queue.put_first(partial(self._drop, self._segments, name, place.seq))

    def purge(self, shelf: bytes) -> None:
        """Give up a shelf: what waits, and what is on the disk."""
        self.queue.forget(shelf)
        if self._segments is not None:
            self.queue.put_first(partial(self._purge, self._segments, shelf))

    def close(self, wait_s: float) -> None:
        """Do what waits, for so long at most, and end."""
        end_s = time.monotonic() + wait_s
        while self.queue.busy and time.monotonic() < end_s:
            self.poll(SYNC_BYTES)
            time.sleep(_WAIT_S)
        if self._workers.stop() and self._segments is not None:
            self._sync(self._segments)
            self._segments.close()

    # On the threads

    def _post(self, size: int, event: Callable[[], None]) -> None:
        self._events.append((size, event))

    def _post_move(self, name: bytes, place: Place | None, seq: int) -> None:
        self._post(0, partial(self._moved, name, place, seq))

    def _seal(
        self,
        entry: Entry,
        context: SealContext,
        page: memoryview,
        layer_bytes: Sequence[int],
        stored: Callable[[Sealed], None],
    ) -> None:
        if entry.gone:
            return
        frame = place = None
        try:
            frame = self._sealer.seal(context, page, layer_bytes)
            if entry.on_disk and self._segments is not None:
                place = self._segments.append(entry.name, entry.shelf, entry.expires_s, frame)
        except Exception as error:  # noqa: BLE001 - a page is lost, never the thread
            self._note(error, "write")
        self._post(0, partial(stored, Sealed(frame, place)))

    def _open(
        self,
        reading: Reading,
        frame: memoryview | None,
        opened: Callable[[Reading, memoryview | None], None],
        failed: Callable[[Reading, Failure], None],
    ) -> None:
        try:
            if frame is None:
                frame = self._read(reading)
            layers = self._sealer.open(reading.context, frame, reading.layer_bytes)
            for layer, data in enumerate(layers):
                self._post(len(data), partial(reading.install, layer, data))
        except Moved:
            self._post(0, partial(failed, reading, Failure.MOVED))
        except KeysUnavailable as error:
            self._note(error, "read")
            self._post(0, partial(failed, reading, Failure.LOCKED))
        except Exception as error:  # noqa: BLE001 - a page is a miss, whatever it was
            self._note(error, "read")
            self._post(0, partial(failed, reading, Failure.BROKEN))
        else:
            self._post(0, partial(opened, reading, frame))

    def _read(self, reading: Reading) -> memoryview:
        if self._segments is None or reading.place is None:
            raise Moved
        return self._segments.read(reading.entry.name, reading.place)

    def _drop(self, segments: Segments, name: bytes, seq: int) -> None:
        try:
            segments.drop(name, seq)
        except OSError as error:
            self._note(error, "drop")

    def _purge(self, segments: Segments, shelf: bytes) -> None:
        try:
            segments.purge(shelf)
        except OSError as error:
            self._note(error, "purge")

    def _rest(self) -> float | None:
        """Make what was written durable in time; return how long that may wait."""
        if self._segments is None or not self._segments.unsynced_bytes:
            self._unsynced_s = None
            return None
        now = time.monotonic()
        if self._unsynced_s is None:
            self._unsynced_s = now
        left_s = self._unsynced_s + SYNC_S - now
        if left_s > 0 and self._segments.unsynced_bytes < SYNC_BYTES:
            return left_s
        self._sync(self._segments)
        self._unsynced_s = None
        return None

    def _sync(self, segments: Segments) -> None:
        try:
            segments.sync()
        except OSError as error:
            self._note(error, "sync")

    def _note(self, error: Exception, doing: str) -> None:
        """Count what went wrong by kind; the first of a kind is logged, and so is each hundredth.

        No name, owner or path is told.
        """
        kind = f"{doing}:{_kind(error)}"
        count = self._errors[kind] + 1
        self._errors[kind] = count
        if count == 1 or count % 100 == 0:
            log.warning("tier: %s (%d times); such pages are computed again", kind, count)


def _kind(error: Exception) -> str:
    """Return a word for an error."""
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, "OSError")
    if isinstance(error, BadRecord):
        return str(error)
    if isinstance(error, KeysUnavailable):
        return "keys"
    return "sealed" if isinstance(error, SealError) else type(error).__name__
