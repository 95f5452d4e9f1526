"""How much is copied between two places in one step: little, and more the longer steps take.

Bytes are counted and time is too: what a copy takes depends on memory and on who else uses it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, NamedTuple

BYTES_PER_S: Final = 64 << 20
"""A copy takes a few hundredths of the time it is allowed for."""

LEAST_S: Final = 0.00075
"""A step may always take so long; at least one page or layer."""
PART: Final = 1 / 64
"""Of the time since the last one, where that is more."""


class Budget(NamedTuple):
    """What one step may do."""

    most_bytes: int
    end_s: float
    """By the pace's clock."""


class Pace:
    """A budget of bytes and time for each step, by the time since the last one."""

    def __init__(
        self,
        least_bytes: int,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        most_s: float = math.inf,
    ) -> None:
        self._least = least_bytes
        self._most = most_bytes
        self._most_s = most_s
        self._clock = clock
        self._last_s = clock()

    def budget(self) -> Budget:
        """Return what may be copied now."""
        now = self._clock()
        since_s, self._last_s = now - self._last_s, now
        earned = min(max(int(since_s * BYTES_PER_S), self._least), self._most)
        return Budget(earned, now + min(max(since_s * PART, LEAST_S), self._most_s))

    def over(self, budget: Budget) -> bool:
        """Tell whether a budget's time is up."""
        return self._clock() >= budget.end_s
