"""What happens to pages off the engine's thread: sealing, writing, reading, opening.

Results wait as events until `poll` runs them on the engine's thread.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from kvkeep.cache.tier.buffers import Buffers, touched
from kvkeep.cache.tier.entries import MEMORY, Entry
from kvkeep.cache.tier.frames import Away, Found, Frames, Place
from kvkeep.cache.tier.opening import Heard, Opener, Opening, Reading
from kvkeep.cache.tier.records import BadRecord
from kvkeep.cache.tier.work import NOWHERE, Workers, WriteQueue
from kvkeep.errors import KeysUnavailable, SealError, unexpected
from kvkeep.sealing import SealContext, TierSealer

SYNC_BYTES: Final = 8 << 20
SYNC_S: Final = 0.1
"""What was written is durable after so many bytes or so long."""
_WAIT_S: Final = 0.001

Moving = Callable[[bytes, Place | None, int], None]
"""Hears of a name, where it lies now, and the number of what was moved."""

log = logging.getLogger(__name__)


class Sealed(NamedTuple):
    """What became of a page that was to be written."""

    frame: memoryview | None
    places: dict[str, Place]


class Backroom:
    """The threads of a tier and what only they touch."""

    def __init__(
        self,
        sealer: TierSealer,
        makes: Mapping[str, Callable[[Moving], Frames]],
        moved: Callable[[str, bytes, Place | None, int], None],
        found: Callable[[str, list[Found]], None],
        clock: Callable[[], float],
        buffers: Buffers,
    ) -> None:
        """Read what the levels hold whose frames `makes` makes; raises `OSError`.

        `moved` hears of pages that lie elsewhere, `found` of those that outlived a restart. Pages
        are opened into memory of `buffers`.
        """
        self._sealer = sealer
        self._moved = moved
        self._found = found
        self._clock = clock
        self._events: deque[tuple[int, Callable[[], None]]] = deque()
        self._errors: Counter[str] = Counter()
        self._unsynced_s: dict[str, float] = {}
        self._spare = Buffers()
        """The writer's own: for frames that are written and not kept."""
        self._frames = {
            level: make(partial(self._post_move, level)) for level, make in makes.items()
        }
        for level, frames in self._frames.items():
            found(level, frames.open(clock()))
        self.queue = WriteQueue()
        opener = Opener(sealer, self._frames, buffers, self._post, self._note)
        self._workers: Workers[Opening] = Workers(self.queue, self._rest, opener.open_all)

    # On the engine's thread

    def poll(self, most_bytes: int, over: Callable[[], bool] = lambda: False) -> None:
        """Run events until so many bytes were handed over, or time is over; at least one."""
        while self._events and most_bytes > 0:
            size, event = self._events.popleft()
            most_bytes -= size
            event()
            if over():
                return

    def due(self) -> bool:
        """Tell whether events wait."""
        return bool(self._events)

    def errors(self) -> Counter[str]:
        """Return how often what went wrong."""
        return sum((frames.errors for frames in self._frames.values()), self._errors.copy())

    def seal(
        self,
        entry: Entry,
        context: SealContext,
        page: memoryview,
        layer_bytes: Sequence[int],
        stored: Callable[[Sealed], None],
    ) -> None:
        """Seal a page and write it to the levels that have room for it."""
        job = partial(self._seal, entry, context, page, layer_bytes, stored)
        self.queue.put(entry.shelf, len(page), job)

    def copy(
        self,
        entry: Entry,
        frame: memoryview,
        levels: Sequence[str],
        stored: Callable[[Sealed], None],
    ) -> None:
        """Write a frame as it is to some levels."""

        def job() -> None:
            self._post(0, partial(stored, Sealed(None, self._append(entry, frame, levels))))

        self.queue.put(entry.shelf, len(frame), job)

    def open(self, opening: Opening) -> None:
        """Have a page opened."""
        frame, place = opening.frame, opening.reading.place
        if frame is not None or place is None:
            self._workers.read(opening, NOWHERE, 0 if frame is None else len(frame))
        else:
            self._workers.read(opening, (place.segment, place.offset), place.length)

    def hand_over(
        self,
        reading: Reading,
        page: memoryview,
        opened: Heard,
    ) -> None:
        """Give out a page that is at hand as if it had been read."""
        reading.entry.readers += 1
        at = 0
        for layer, size in enumerate(reading.layer_bytes):
            self._post(size, partial(reading.install, layer, page[at : at + size]))
            at += size

        def end() -> None:
            reading.entry.readers -= 1
            opened(reading, None, False)

        self._post(0, end)

    def prepare(self, size: int, count: int, ready: Callable[[memoryview], None]) -> None:
        """Have so much memory made and touched, so often."""
        for _ in range(count):
            self.queue.put_first(lambda: self._post(0, partial(ready, touched(size))))

    def drop(self, level: str, name: bytes, place: Place) -> None:
        """Give up a page in a level."""
        self.queue.put_first(partial(self._drop, self._frames[level], name, place.seq))

    def purge(self, shelf: bytes) -> None:
        """Give up a shelf: what waits, and what lies in any level."""
        self.queue.forget(shelf)
        for frames in self._frames.values():
            self.queue.put_first(partial(self._purge, frames, shelf))

    def close(self, wait_s: float) -> None:
        """Do what waits, for so long at most, and end."""
        end_s = time.monotonic() + wait_s
        while self.queue.busy and time.monotonic() < end_s:
            self.poll(SYNC_BYTES)
            time.sleep(_WAIT_S)
        if self._workers.stop():
            for frames in self._frames.values():
                self._sync(frames)
                frames.close()

    # On the threads

    def _post(self, size: int, event: Callable[[], None]) -> None:
        self._events.append((size, event))

    def _post_move(self, level: str, name: bytes, place: Place | None, seq: int) -> None:
        self._post(0, partial(self._moved, level, name, place, seq))

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
        frame = own = None
        places: dict[str, Place] = {}
        try:
            if MEMORY not in entry.on:
                own = self._spare.take(self._sealer.frame_bytes(layer_bytes))
            frame = self._sealer.seal(context, page, layer_bytes, own)
            places = self._append(entry, frame, tuple(self._frames))
        except Exception as error:  # noqa: BLE001 - a page is lost, never the thread
            self._note(error, "write")
        if own is not None:
            self._spare.give_back(own)
            frame = None
        self._post(0, partial(stored, Sealed(frame, places)))

    def _append(self, entry: Entry, frame: memoryview, levels: Sequence[str]) -> dict[str, Place]:
        """Write a frame to those levels that have room for it; return where it lies now."""
        places: dict[str, Place] = {}
        for level in levels:
            if level not in entry.on:
                continue
            try:
                place = self._frames[level].append(entry.name, entry.shelf, entry.expires_s, frame)
            except OSError as error:
                self._note(error, "write")
            else:
                places[level] = place
        return places

    def _drop(self, frames: Frames, name: bytes, seq: int) -> None:
        try:
            frames.drop(name, seq)
        except OSError as error:
            self._note(error, "drop")

    def _purge(self, frames: Frames, shelf: bytes) -> None:
        try:
            frames.purge(shelf)
        except OSError as error:
            self._note(error, "purge")

    def _rest(self) -> float | None:
        """Make what was written durable in time; return how long that may wait.

        And list what could not be listed before.
        """
        waits = [self._rest_of(level, frames) for level, frames in self._frames.items()]
        return min((wait_s for wait_s in waits if wait_s is not None), default=None)

    def _rest_of(self, level: str, frames: Frames) -> float | None:
        if frames.unread():
            self._list(level, frames)
        if not frames.unsynced_bytes:
            self._unsynced_s.pop(level, None)
            return None
        now = time.monotonic()
        left_s = self._unsynced_s.setdefault(level, now) + SYNC_S - now
        if left_s > 0 and frames.unsynced_bytes < SYNC_BYTES:
            return left_s
        self._sync(frames)
        del self._unsynced_s[level]
        return None

    def _list(self, level: str, frames: Frames) -> None:
        try:
            self._post(0, partial(self._found, level, frames.open(self._clock())))
        except OSError as error:
            self._note(error, "list")

    def _sync(self, frames: Frames) -> None:
        try:
            frames.sync()
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
    if isinstance(error, Away):
        return "away"
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, "OSError")
    if isinstance(error, BadRecord):
        return str(error)
    if isinstance(error, KeysUnavailable):
        return "keys"
    return "sealed" if isinstance(error, SealError) else unexpected(error)
