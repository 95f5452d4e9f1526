"""Memory that pages and frames lie in for a moment: kept, for fresh memory is slow to touch."""

from __future__ import annotations

import threading
from typing import Final

import numpy as np

KEPT_BYTES: Final = 32 << 20
"""Of memory nobody uses, at most."""
PREPARED: Final = 16
"""Buffers of a size made before they are needed."""


class Buffers:
    """Writable memory by size, for any thread."""

    def __init__(self, kept_bytes: int = KEPT_BYTES, *, wipe: bool = False) -> None:
        """`wipe`: memory is zeroed as it is given back."""
        self._wipe = wipe
        self._most = kept_bytes
        self._free: dict[int, list[memoryview]] = {}
        self._known: set[int] = set()
        self._lock = threading.Lock()
        self.kept_bytes = 0

    def lacks(self, size: int) -> int:
        """Return how many of a size are to be prepared; the first time it is asked about alone."""
        if size in self._known:
            return 0
        self._known.add(size)
        return min(PREPARED, (self._most - self.kept_bytes) // max(size, 1))

    def take(self, size: int) -> memoryview:
        """Return so many bytes; what they hold is of no account."""
        with self._lock:
            free = self._free.get(size)
            if free:
                self.kept_bytes -= size
                return free.pop()
        return np.empty(size, np.uint8).data

    def give_back(self, buffer: memoryview) -> None:
        """Take memory back that nothing reads any more."""
        if self._wipe:
            np.frombuffer(buffer, np.uint8).fill(0)
        with self._lock:
            if self.kept_bytes + len(buffer) <= self._most:
                self._free.setdefault(len(buffer), []).append(buffer)
                self.kept_bytes += len(buffer)


def touched(size: int) -> memoryview:
    """Return fresh memory that is there already; for a thread that has time."""
    buffer = np.empty(size, np.uint8)
    buffer.fill(0)
    return buffer.data
