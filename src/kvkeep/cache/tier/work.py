"""What is done beside the engine's loop: one thread writes, others read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Final, Generic, NamedTuple, TypeVar

Job = Callable[[], None]
At = tuple[int, int]
"""A segment, and an offset in it."""
NOWHERE: Final[At] = (0, 0)
T = TypeVar("T")

READERS: Final = 2
PIECE_BYTES: Final = 4 << 20
"""Read by one thread at a time before it opens any of it; at least one page."""
_JOIN_S: Final = 5.0


class WriteQueue:
    """Jobs by shelf, each shelf in turn, within so many bytes each; what is urgent goes first.

    No lock is held while a job runs.
    """

    def __init__(self) -> None:
        self._ready = threading.Condition(threading.Lock())
        self._urgent: deque[Job] = deque()
        self._jobs: dict[bytes, deque[tuple[int, Job]]] = {}
        self._bytes: dict[bytes, int] = {}
        self._running: tuple[bytes, int] | None = None
        self._urgent_runs = False

    def has_room(self, shelf: bytes, size: int, most: int) -> bool:
        """Tell whether a shelf may have so many bytes more under way; one job always may."""
        used = self._bytes.get(shelf, 0)
        return used == 0 or used + size <= most

    def put(self, shelf: bytes, size: int, job: Job) -> None:
        """Add a job that holds so many bytes."""
        with self._ready:
            self._jobs.setdefault(shelf, deque()).append((size, job))
            self._bytes[shelf] = self._bytes.get(shelf, 0) + size
            self._ready.notify()

    def put_first(self, job: Job) -> None:
        """Add a job that goes before all shelves'."""
        with self._ready:
            self._urgent.append(job)
            self._ready.notify()

    def forget(self, shelf: bytes) -> None:
        """Drop a shelf's jobs but the one that runs."""
        with self._ready:
            for size, _ in self._jobs.pop(shelf, ()):
                self._free(shelf, size)

    def get(self, wait_s: float | None) -> Job | None:
        """Return the next job; None where none came in time. The last one counts as done."""
        with self._ready:
            if self._running is not None:
                self._free(*self._running)
                self._running = None
            self._urgent_runs = False
            if not (self._urgent or self._jobs):
                self._ready.wait(wait_s)
            if self._urgent:
                self._urgent_runs = True  # before it is taken: `busy` asks without the lock
                return self._urgent.popleft()
            if not self._jobs:
                return None
            shelf = next(iter(self._jobs))
            own = self._jobs.pop(shelf)
            size, job = own.popleft()
            if own:
                self._jobs[shelf] = own  # behind the others
            self._running = (shelf, size)
            return job

    @property
    def busy(self) -> bool:
        """Tell whether jobs wait or run."""
        return bool(self._bytes or self._urgent or self._urgent_runs)

    def _free(self, shelf: bytes, size: int) -> None:
        self._bytes[shelf] -= size
        if not self._bytes[shelf]:
            del self._bytes[shelf]


class _Read(NamedTuple, Generic[T]):
    at: At
    size: int
    item: T


class ReadQueue(Generic[T]):
    """What is to be read: what waits when a round begins goes in the order of its places.

    Pages are written deepest first and asked for the other way round, and a system reads a file
    ahead, and in large pieces, only where it is read forwards. What comes later waits for the
    next round, so that nothing waits for ever.
    """

    def __init__(self) -> None:
        self._ready = threading.Condition(threading.Lock())
        self._waiting: list[_Read[T]] = []
        self._round: deque[_Read[T]] = deque()
        self._closed = False

    def put(self, item: T, at: At, size: int) -> None:
        """Add what reads so many bytes there."""
        with self._ready:
            self._waiting.append(_Read(at, size, item))
            self._ready.notify()

    def get(self) -> list[T]:
        """Return what comes next, waiting for it; nothing once it was closed and all is read.

        Several at a time, one reader's part of what there is, and `PIECE_BYTES` at most.
        """
        with self._ready:
            while not (self._round or self._waiting or self._closed):
                self._ready.wait()
            if not self._round:
                self._round.extend(sorted(self._waiting, key=attrgetter("at")))
                self._waiting.clear()
            taken: list[T] = []
            left, most = PIECE_BYTES, -(-len(self._round) // READERS)
            while len(taken) < most and (not taken or self._round[0].size <= left):
                read = self._round.popleft()
                taken.append(read.item)
                left -= read.size
            return taken

    def close(self) -> None:
        """Let readers end after what waits."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()


class Workers(Generic[T]):
    """The threads of one tier."""

    def __init__(
        self,
        jobs: WriteQueue,
        rest: Callable[[], float | None],
        read: Callable[[list[T]], None],
    ) -> None:
        """`rest` runs after each job of the writer and returns how long it may wait for the next.

        `read` is called on reading threads. Jobs and `read` raise nothing.
        """
        self._jobs = jobs
        self._rest = rest
        self._do_read = read
        self._reads: ReadQueue[T] = ReadQueue()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._write, name="kvkeep-tier-write", daemon=True),
            *(
                threading.Thread(target=self._read, name="kvkeep-tier-read", daemon=True)
                for _ in range(READERS)
            ),
        ]
        for thread in self._threads:
            thread.start()

    def read(self, item: T, at: At, size: int) -> None:
        """Have so many bytes read there on a reading thread."""
        self._reads.put(item, at, size)

    def stop(self) -> bool:
        """End the threads after what they are at; False where one did not end in time."""
        self._stopping = True
        self._jobs.put_first(lambda: None)
        self._reads.close()
        for thread in self._threads:
            thread.join(_JOIN_S)
        return not any(thread.is_alive() for thread in self._threads)

    def _write(self) -> None:
        wait_s: float | None = None
        while not self._stopping:
            job = self._jobs.get(wait_s)
            if job is not None:
                job()
            wait_s = self._rest()

    def _read(self) -> None:
        while items := self._reads.get():
            self._do_read(items)
