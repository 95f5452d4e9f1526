"""The thread that reads prompts; it is started again where it died."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvkeep.sharing.scans import ScanJob, ScanQueue

Read = Callable[[ScanJob], int]
"""Returns how many leading units of a job are clear."""

_WAIT_S = 0.5

log = logging.getLogger(__name__)


def read_one(queue: ScanQueue, read: Read, wait_s: float = 0.0) -> bool:
    """Read the next job; an error in it is a doubt about all of it. False: there was none."""
    job = queue.take(wait_s)
    if job is None:
        return False
    cleared: int | None = None
    begun = time.thread_time()
    try:
        cleared = read(job)
    except Exception as error:  # noqa: BLE001 - whatever it is, the text was not cleared
        log.warning("a prompt could not be scanned: %s", type(error).__name__)
    finally:
        queue.counts.seconds += time.thread_time() - begun
        if cleared is None:
            queue.give_up(job)
        else:
            queue.finish(job, cleared)
    return True


class Worker:
    """Reads jobs in a thread of its own."""

    def __init__(self, queue: ScanQueue, read: Read) -> None:
        self._queue = queue
        self._read = read
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def ensure(self) -> None:
        """Start the thread, again where it has died."""
        if self._stop.is_set() or (self._thread is not None and self._thread.is_alive()):
            return
        if self._thread is not None:
            self._queue.counts.restarts += 1
        self._thread = threading.Thread(target=self._run, name="kvkeep-scan", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the job it reads."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _WAIT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            read_one(self._queue, self._read, _WAIT_S)
