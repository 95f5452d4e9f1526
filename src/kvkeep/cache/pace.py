"""How much is copied between two places in one step: little, and more the longer steps take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

BYTES_PER_S: Final = 64 << 20
"""A copy takes a few hundredths of the time it is allowed for."""


class Pace:
    """A budget of bytes for each step, by the time since the last one."""

    def __init__(
        self, least_bytes: int, most_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._least = least_bytes
        self._most = most_bytes
        self._clock = clock
        self._last_s = clock()

    def budget(self) -> int:
        """Return what may be copied now."""
        now = self._clock()
        earned = int((now - self._last_s) * BYTES_PER_S)
        self._last_s = now
        return min(max(earned, self._least), self._most)
