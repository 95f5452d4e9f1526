"""Holding first tokens back until computing what young shared pages saved would be over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from kvkeep.cache.matching import Match
from kvkeep.types import PAGE_TOKENS

QUANTUM_S: Final = 0.02
YOUNG_EPOCHS: Final = 24
MARGIN: Final = 1.25
"""Over the measured costs, so that a request that computes everything is seldom later."""


class PrefillCost(NamedTuple):
    """Seconds that a prompt takes on an idle engine: `call_s` + `token_s` for each token."""

    call_s: float
    token_s: float

    @classmethod
    def of(cls, one_s: float, many_s: float, tokens: int) -> PrefillCost:
        """Return the costs behind the seconds of 1 token and of `tokens`."""
        token_s = max(0.0, many_s - one_s) / (tokens - 1)
        return cls(MARGIN * one_s, MARGIN * token_s)


class TtftGate:
    """Says when a request's first token may be computed.

    That is a function of the tokens its tenant's own pages, pinned ones and shared ones of
    `YOUNG_EPOCHS` or more lack, rounded up to `QUANTUM_S`: the same whether younger shared pages
    were there or not. Load can make a request later than that; it never makes one earlier.
    """

    def __init__(
        self,
        consumes: Callable[[str], bool],
        epoch_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consumes = consumes
        self._young_s = YOUNG_EPOCHS * epoch_s
        self._clock = clock
        self._cost = PrefillCost(0.0, 0.0)
        self._now_s = 0.0

    def set_cost(self, cost: PrefillCost) -> None:
        """Take what a prompt costs on this machine."""
        self._cost = cost

    def end_epoch(self, now_s: float) -> None:
        """Hear that an epoch ended, in the time that pages' ages are told in."""
        self._now_s = now_s

    def opens_s(self, match: Match, prompt_tokens: int, *, account: str) -> float:
        """Return the clock's time before which no first token comes.

        An account that may not read shared pages does not wait.
        """
        if not self._consumes(account):
            return -math.inf
        born = [page.since_s for page in match.snapshot]
        young = next(
            (i for i, at in enumerate(born) if at > self._now_s - self._young_s), len(born)
        )
        pages = len(match.public) + len(match.own) + young
        known = max(match.cached_tokens, pages * PAGE_TOKENS)
        return self._clock() + self._wait_s(max(0, prompt_tokens - known))

    def is_open(self, opens_s: float) -> bool:
        """Tell whether that time has come."""
        return self._clock() >= opens_s

    def bits(self, max_tokens: int) -> float:
        """Return what one first token's time can tell at most: as many bits as there are times."""
        return math.log2(1 + self._wait_s(max_tokens) / QUANTUM_S)

    def _wait_s(self, tokens: int) -> float:
        cost = self._cost.call_s + self._cost.token_s * tokens
        return math.ceil(cost / QUANTUM_S) * QUANTUM_S
