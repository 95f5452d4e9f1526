"""`dp`: public with a probability that one tenant more or less hardly changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import msgspec

from kvkeep.errors import ConfigError
from kvkeep.sharing.ledger import Key, Unit
from kvkeep.sharing.snapshot import Entry


def publish_probability(n: int, eps: float, delta: float) -> float:
    """Return pi(n) of partition selection: the most that (eps, delta) allows for n tenants.

    Source: Desfontaines, Voss, Gipson and Mandayam, 2006.03684, the recurrence of theorem 1.
    """
    grow, shrink = math.exp(eps), math.exp(-eps)
    p = 0.0
    for _ in range(n):
        p = min(grow * p + delta, 1 - shrink * (1 - p - delta), 1.0)
    return p


class Noisy(msgspec.Struct, frozen=True):
    """Public for one window with probability pi(n), n the other tenants that sent it in the last.

    One draw per unit and window, keyed; nothing is decided within a window, since the time of a
    decision would tell whose vote it was.
    """

    key: bytes
    eps: float = 1.0
    delta: float = 1e-6
    window_epochs: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 16:
            raise ConfigError("share_eps: must lie above 0 and at most at 16")
        if not 0 < self.delta < 0.1:
            raise ConfigError("share_delta: must lie between 0 and 0.1")
        if self.window_epochs < 2:
            raise ConfigError("share_life_epochs: must be at least 2, a decision takes that long")

    @property
    def life_epochs(self) -> int:
        """Return two windows: the one a vote is cast in, and the one it is read in."""
        return 2 * self.window_epochs

    def period_epochs(self, epochs_per_day: int) -> int:
        """Return a window: each has a draw of its own, so a vote in each costs anew."""
        return self.window_epochs

    def decide(
        self, units: Mapping[Key, Unit], changed: AbstractSet[Key], closed: int, now: int
    ) -> dict[Key, Entry | None]:
        """Draw for every unit where a window has ended, for none otherwise."""
        if closed // self.window_epochs == now // self.window_epochs:
            return {}
        return {key: self._entry(key, unit, now) for key, unit in units.items()}

    def eps_total(self, units_per_period: int, epochs_per_day: int) -> float | None:
        """Return what one tenant's whole day may cost: eps for each unit and window."""
        return self.eps * units_per_period * -(-epochs_per_day // self.window_epochs)

    def _entry(self, key: Key, unit: Unit, now: int) -> Entry | None:
        window = now // self.window_epochs
        first = (window - 1) * self.window_epochs
        voters = frozenset(v for v, at in unit.votes.items() if first <= at < now)
        draw = self._draw(key, window)
        for_all = draw < publish_probability(len(voters), self.eps, self.delta)
        for_voters = draw < publish_probability(max(len(voters) - 1, 0), self.eps, self.delta)
        until = (window + 1) * self.window_epochs - 1
        if not for_all:
            return None
        return Entry.of(unit, until, until if for_voters else -1, voters)

    def _draw(self, key: Key, window: int) -> float:
        h = hashlib.blake2b(key=self.key, digest_size=8, person=b"kvkeep-draw")
        h.update(len(key[0]).to_bytes(4, "little") + key[0].encode() + key[1])
        h.update(window.to_bytes(8, "little"))
        return int.from_bytes(h.digest(), "little") / 2**64
