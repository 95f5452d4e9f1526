"""Records in files: appended, found again at start, moved together where much has gone.

One thread appends, drops and moves; `read` may run in others. What is dropped is noted by a record
of its own, so that it stays dropped after a restart; that note goes when no file holds the name's
older bytes any more.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvkeep.cache.tier.files import File, Files
from kvkeep.cache.tier.frames import Found, Moved, Place
from kvkeep.cache.tier.records import (
    HEADER_BYTES,
    BadRecord,
    Flag,
    Record,
    encode,
    frame_of,
    record_bytes,
    scan,
)

SUFFIX: Final = ".segment"
_NAME: Final = re.compile(r"[0-9a-f]{8,}\.segment")
LARGEST_BYTES: Final = 64 << 20
PARTS: Final = 16
"""A tier has at least so many segments, and up to sixteen times as many."""
SPARE: Final = 0.25
"""Of a tier's size, room for what has gone and not yet been cleared away."""


class _Dead(NamedTuple):
    """A record that holds nothing any more."""

    name: bytes
    shelf: bytes
    place: Place


@dataclass(slots=True, eq=False)
class _Segment:
    """One file."""

    number: int
    file: File
    size: int = 0
    live: dict[bytes, tuple[Place, bytes]] = field(default_factory=dict)
    """(place, shelf) by name."""
    live_bytes: int = 0
    dead: list[_Dead] = field(default_factory=list)
    notes: dict[bytes, Record] = field(default_factory=dict)
    """Records that say what has gone."""

    @property
    def name(self) -> str:
        return f"{self.number:08x}{SUFFIX}"


def segment_bytes(limit_bytes: int) -> int:
    """Return how large the segments of a tier are."""
    return max(min(LARGEST_BYTES, limit_bytes // PARTS), limit_bytes // (PARTS * PARTS))


class Segments:
    """All files of a disk tier."""

    def __init__(
        self,
        files: Files,
        limit_bytes: int,
        moved: Callable[[bytes, Place | None, int], None] = lambda *_: None,
    ) -> None:
        """`moved(name, place, seq)` hears of what lies elsewhere now; None: it could not be read.

        Raises `OSError` where nothing can be listed.
        """
        self._files = files
        self._limit = limit_bytes
        self._most = segment_bytes(limit_bytes)
        self._moved = moved
        self._segments: dict[int, _Segment] = {}
        self._where: dict[bytes, _Segment] = {}
        self._dead: Counter[bytes] = Counter()
        self._active: _Segment | None = None
        self._next = self._seq = 1
        self.unsynced_bytes = 0
        self.errors: Counter[str] = Counter()
        """Bad places found, by kind."""

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(segment.size for segment in self._segments.values())

    def open(self, now: float) -> list[Found]:
        """Read what there is; return the pages that hold at `now`, the oldest first."""
        best: dict[bytes, tuple[_Segment, int, Record]] = {}
        notes: dict[bytes, Record] = {}
        every: list[tuple[_Segment, _Dead]] = []
        for file in self._files.names():
            if _NAME.fullmatch(file):
                self._load(file, best, notes, every)
        for name, note in notes.items():
            if name in best and best[name][2].seq < note.seq:
                del best[name]
        expired = [n for n, (_, _, r) in best.items() if 0 < r.expires_s <= now]
        for name in expired:
            del best[name]
        for segment, one in every:
            known = best.get(one.name)
            if known is None or known[:2] != (segment, one.place.offset):
                self._bury(segment, one)
        for segment in self._segments.values():
            purged = [d for d in segment.dead if _is_purged(d, notes.get(d.name))]
            try:
                self._wipe(segment, purged)
            except OSError:
                self.errors["wipe"] += 1
        last = self._segments.get(self._next - 1)
        self._active = last if last is not None and last.size < self._most else None
        return [self._keep(*one) for one in sorted(best.values(), key=lambda one: one[2].seq)]

    def append(
        self, name: bytes, shelf: bytes, expires_s: float, frame: bytes | memoryview
    ) -> Place:
        """Write a page; one of its name that was there before is gone.

        Raises `OSError`: nothing has changed then.
        """
        self._make_room(record_bytes(len(frame)))
        record = Record(name, shelf, self._new_seq(), expires_s, Flag.FRAME, len(frame))
        segment, offset = self._write(encode(record, frame), record.size)
        self._forget(name)
        return self._keep(segment, offset, record).place

    def drop(self, name: bytes, seq: int) -> None:
        """Give up a page, if it is the one meant.

        Raises `OSError` where that cannot be noted: it may be there again after a restart.
        """
        segment = self._where.get(name)
        if segment is not None and segment.live[name][0].seq == seq:
            self._note(name, segment.live[name][1], Flag.GONE)

    def purge(self, shelf: bytes) -> int:
        """Give up a shelf and overwrite its frames; return how many pages.

        Raises `OSError` where not all of it could be written; the rest was done.
        """
        mine = [
            name
            for segment in self._segments.values()
            for name, (_, own) in segment.live.items()
            if own == shelf
        ]
        failed: list[OSError] = []
        for name in mine:
            with _keeping(failed):
                self._note(name, shelf, Flag.GONE | Flag.PURGED)
        with _keeping(failed):
            self.sync()
        for segment in list(self._segments.values()):
            with _keeping(failed):
                self._wipe(segment, [dead for dead in segment.dead if dead.shelf == shelf])
        for error in failed:
            raise error
        return len(mine)

    def read(self, name: bytes, place: Place, into: memoryview | None = None) -> memoryview:
        """Return a page's frame; raises `OSError`, `BadRecord`, or `Moved` where it was moved."""
        segment = self._segments.get(place.segment)
        if segment is None:
            raise Moved
        if into is None:
            raw = memoryview(segment.file.read(place.offset, record_bytes(place.length)))
        else:
            raw = into[: segment.file.fill(place.offset, into)]
        return frame_of(raw, name, place.seq)

    def sync(self) -> None:
        """Make what was appended outlive the machine's power; raises `OSError`."""
        self.unsynced_bytes = 0
        if self._active is not None:
            try:
                self._active.file.sync()
            except OSError:
                self._active = None  # what it holds is checked when it is read
                raise

    def unread(self) -> bool:
        """Return False: files are read at start or not at all."""
        return False

    def close(self) -> None:
        """Let go of all files."""
        self._segments.clear()
        self._where.clear()
        self._active = None
        self._files.close()

    def _load(
        self,
        name: str,
        best: dict[bytes, tuple[_Segment, int, Record]],
        notes: dict[bytes, Record],
        every: list[tuple[_Segment, _Dead]],
    ) -> None:
        """Read the headers of one file; one that cannot be read is left alone and counted."""
        number = int(name.removesuffix(SUFFIX), 16)
        self._next = max(self._next, number + 1)
        try:
            file = self._files.open(name)
            found = scan(file)
            size = file.size()
        except OSError:
            self.errors["segment"] += 1
            return
        segment = _Segment(number, file, size)
        self.errors["record"] += found.bad
        if found.end < size:
            self._cut(segment, found.end)
        self._segments[number] = segment
        for offset, record in found.found:
            self._seq = max(self._seq, record.seq + 1)
            if record.flags & Flag.GONE:
                for known_notes in (segment.notes, notes):
                    older = known_notes.get(record.name)
                    if older is None or older.seq < record.seq:
                        known_notes[record.name] = record
                continue
            place = Place(number, offset, record.length, record.seq)
            every.append((segment, _Dead(record.name, record.shelf, place)))
            known = best.get(record.name)
            if known is None or known[2].seq <= record.seq:
                best[record.name] = (segment, offset, record)

    def _keep(self, segment: _Segment, offset: int, record: Record) -> Found:
        place = Place(segment.number, offset, record.length, record.seq)
        segment.live[record.name] = (place, record.shelf)
        segment.live_bytes += record.size
        self._where[record.name] = segment
        return Found(record.name, record.shelf, place, record.expires_s)

    def _forget(self, name: bytes) -> None:
        """Take note that the bytes of a name hold nothing any more."""
        segment = self._where.pop(name, None)
        if segment is not None:
            place, shelf = segment.live.pop(name)
            segment.live_bytes -= record_bytes(place.length)
            self._bury(segment, _Dead(name, shelf, place))

    def _bury(self, segment: _Segment, dead: _Dead) -> None:
        segment.dead.append(dead)
        self._dead[dead.name] += 1

    def _wipe(self, segment: _Segment, gone: list[_Dead]) -> None:
        """Overwrite frames that hold nothing any more; raises `OSError`."""
        for dead in gone:
            zeros = memoryview(bytes(dead.place.length))
            _write_all(segment.file, dead.place.offset + HEADER_BYTES, zeros)
        if gone:
            segment.file.sync()

    def _note(self, name: bytes, shelf: bytes, flags: Flag) -> None:
        """Take a name's page out, and write that it has gone."""
        self._forget(name)
        record = Record(name, shelf, self._new_seq(), 0.0, flags, 0)
        segment, _ = self._write(encode(record, b""), record.size)
        segment.notes[name] = record

    def _new_seq(self) -> int:
        self._seq += 1
        return self._seq - 1

    def _write(self, parts: Sequence[bytes | memoryview], size: int) -> tuple[_Segment, int]:
        """Append bytes to the active segment, or to a new one; return it and where they begin."""
        segment = self._active
        if segment is None or (segment.size and segment.size + size > self._most):
            segment = self._roll()
        offset = segment.size
        at = offset
        try:
            for part in parts:
                _write_all(segment.file, at, memoryview(part))
                at += len(part)
        except OSError:
            self._cut(segment, offset)
            raise
        segment.size += size
        self.unsynced_bytes += size
        return segment, offset

    def _cut(self, segment: _Segment, size: int) -> None:
        """Take half a record back, or leave it to be written over."""
        with suppress(OSError):
            segment.file.truncate(size)
        segment.size = size

    def _roll(self) -> _Segment:
        """Begin a new segment."""
        if self._active is not None:
            self.sync()
        fresh = _Segment(self._next, self._files.open(f"{self._next:08x}{SUFFIX}"))
        self._next += 1
        self._segments[fresh.number] = fresh
        self._active = fresh
        self._files.sync()
        return fresh

    def _make_room(self, size: int) -> None:
        """Clear away what has gone, the emptiest segments first, until a record fits.

        Raises `OSError` where what holds fills the tier.
        """
        while self.total_bytes + size > self._limit - self._most:
            worth = [s for s in self._segments.values() if s.size - s.live_bytes > s.size // 16]
            if not worth:
                raise OSError(errno.ENOSPC, "the tier is full of pages that hold")
            self._move_out(min(worth, key=lambda s: s.live_bytes / s.size))

    def _move_out(self, segment: _Segment) -> None:
        """Copy what holds to the active segment and delete this one."""
        if segment is self._active:
            self._roll()
        for name, (place, shelf) in list(segment.live.items()):
            raw = segment.file.read(place.offset, record_bytes(place.length))
            try:
                frame_of(raw, name, place.seq)
            except BadRecord:
                self.errors["record"] += 1
                self._note(name, shelf, Flag.GONE)
                self._moved(name, None, place.seq)
                continue
            target, offset = self._write((raw,), len(raw))
            self._forget(name)
            new = place._replace(segment=target.number, offset=offset)
            target.live[name] = (new, shelf)
            target.live_bytes += len(raw)
            self._where[name] = target
            self._moved(name, new, place.seq)
        here = Counter(dead.name for dead in segment.dead)
        for name, note in segment.notes.items():
            if self._dead[name] > here[name]:
                target, _ = self._write(encode(note, b""), note.size)
                known = target.notes.get(name)
                target.notes[name] = note if known is None or known.seq < note.seq else known
        self.sync()
        self._files.remove(segment.name)
        for name, count in here.items():
            self._dead[name] -= count
            if not self._dead[name]:
                del self._dead[name]
        del self._segments[segment.number]


def _is_purged(dead: _Dead, note: Record | None) -> bool:
    """Tell whether a record's frame is to be overwritten."""
    return note is not None and bool(note.flags & Flag.PURGED) and dead.place.seq < note.seq


@contextmanager
def _keeping(failed: list[OSError]) -> Iterator[None]:
    """Go on after an error, which is kept."""
    try:
        yield
    except OSError as error:
        failed.append(error)


def _write_all(file: File, offset: int, data: memoryview) -> None:
    """Write all of it, going on where a write was cut short; raises `OSError`."""
    while data:
        taken = file.write(offset, data)
        if not taken:
            raise OSError(errno.EIO, "nothing was written")
        offset, data = offset + taken, data[taken:]
