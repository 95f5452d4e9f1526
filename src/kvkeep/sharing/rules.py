"""When a unit is public: for whom enough others have sent it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol

from kvkeep.sharing.ledger import Key, Unit
from kvkeep.sharing.snapshot import Entry


class Rule(Protocol):
    """Decides about units from their votes alone."""

    @property
    def life_epochs(self) -> int:
        """Return how long an unconfirmed vote is kept."""

    def period_epochs(self, epochs_per_day: int) -> int:
        """Return the epochs after which a vote for the same unit costs anew."""

    def eps_total(self, units_per_period: int, epochs_per_day: int) -> float | None:
        """Return the privacy loss of one tenant's day; None where the rule draws nothing."""

    def decide(
        self, units: Mapping[Key, Unit], changed: AbstractSet[Key], closed: int, now: int
    ) -> dict[Key, Entry | None]:
        """Return what the votes make of units from epoch `now` on, `closed` having ended.

        None leaves a unit as it is, public until its entry ends.
        """
