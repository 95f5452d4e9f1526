"""Memory that pages are copied into: kept for the next ones, for fresh memory is slow to touch."""

from __future__ import annotations

from typing import Final

import numpy as np

KEPT_BYTES: Final = 32 << 20
"""Of memory nobody uses, at most."""


class Buffers:
    """Writable memory by size; one thread takes and gives back."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._most = kept_bytes
        self._free: dict[int, list[memoryview]] = {}
        self.kept_bytes = 0

    def take(self, size: int) -> memoryview:
        """Return so many bytes; what they hold is of no account."""
        free = self._free.get(size)
        if not free:
            return np.empty(size, np.uint8).data
        self.kept_bytes -= size
        return free.pop()

    def give_back(self, buffer: memoryview) -> None:
        """Take memory back that nothing reads any more."""
        if self.kept_bytes + len(buffer) <= self._most:
            self._free.setdefault(len(buffer), []).append(buffer)
            self.kept_bytes += len(buffer)
