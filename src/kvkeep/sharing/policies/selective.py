"""`selective`, the default: public to a tenant once k others of its group have sent it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import msgspec

from kvkeep.errors import ConfigError
from kvkeep.sharing.ledger import Key, Unit
from kvkeep.sharing.snapshot import Entry


class AtLeast(msgspec.Struct, frozen=True):
    """Public to a tenant while at least `k` other tenants have confirmed it within its life."""

    k: int = 4
    life_epochs: int = 60

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ConfigError("share_k: must be at least 2; one other tenant is no crowd")
        if self.life_epochs < 2:
            raise ConfigError("share_life_epochs: must be at least 2, a decision takes that long")

    def period_epochs(self, epochs_per_day: int) -> int:
        """Return a day: confirming again within it costs nothing."""
        return epochs_per_day

    def eps_total(self, units_per_period: int, epochs_per_day: int) -> float | None:
        """Return None: a count is no noise."""
        return None

    def decide(
        self, units: Mapping[Key, Unit], changed: AbstractSet[Key], closed: int, now: int
    ) -> dict[Key, Entry | None]:
        """Decide what was voted for since the last time; votes age by themselves."""
        return {key: self._entry(units[key]) for key in changed}

    def _entry(self, unit: Unit) -> Entry | None:
        """Return until when the k-th latest vote carries it, and the next one for the first k."""
        ranked = sorted(unit.votes.items(), key=lambda vote: (-vote[1], vote[0]))
        if len(ranked) < self.k:
            return None
        until = ranked[self.k - 1][1] + self.life_epochs
        also = ranked[self.k][1] + self.life_epochs if len(ranked) > self.k else -1
        return Entry.of(unit, until, also, frozenset(voter for voter, _ in ranked[: self.k]))
