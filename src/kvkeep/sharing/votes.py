"""Votes, the rule that decides by them and what is public: the same state gives the same decisions.

One engine has its own; of a cluster's workers whoever leads them counts the votes of all, and each
worker takes the state that came of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvkeep.errors import ConfigError
from kvkeep.sharing.ledger import Ballot, Ledger
from kvkeep.sharing.rules import Rule
from kvkeep.sharing.scans import ScanLimits
from kvkeep.sharing.snapshot import Snapshot, advance
from kvkeep.sharing.state import StateStore, decode_state, encode_state, renewed

DAY_S = 86_400

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromotionLimits:
    """How promotion is paced and what one tenant may put into it."""

    epoch_s: float = 60.0
    unit_pages: int = 4
    """Pages per vote."""
    units_per_day: int = 1024
    """New units a tenant may vote for in a day."""
    scans: ScanLimits = field(default_factory=ScanLimits)

    def __post_init__(self) -> None:
        if not 0 < self.epoch_s <= DAY_S:
            raise ConfigError("share_epoch_s: must lie above 0 and be at most a day")
        if self.unit_pages < 1 or self.units_per_day < 1:
            raise ConfigError("share_units_per_day: must be at least 1")

    @property
    def epochs_per_day(self) -> int:
        """Return the epochs of a day, at least one."""
        return max(1, int(DAY_S // self.epoch_s))

    def epoch_at(self, now: float) -> int:
        """Return the number of the epoch that runs at `now` (seconds)."""
        return int(now // self.epoch_s)

    def next_epoch(self, closed: int, now: float) -> int:
        """Return the number of the epoch that begins at `now`, after another."""
        return max(closed + 1, self.epoch_at(now))


class Votes:
    """The state of promotion, kept over restarts."""

    def __init__(
        self, rule: Rule, limits: PromotionLimits, store: StateStore, version: str | None = None
    ) -> None:
        """`version`: of what cleared prompts; None: whatever did."""
        self._rule = rule
        self._limits = limits
        self._store = store
        self._state = decode_state(store.load(), version, limits.unit_pages)

    @property
    def ledger(self) -> Ledger:
        """Return who has voted for what."""
        return self._state.ledger

    @property
    def snapshot(self) -> Snapshot:
        """Return what is public."""
        return self._state.snapshot

    @property
    def units_per_period(self) -> int:
        """Return the new units a tenant may vote for before votes cost anew."""
        a_day = self._limits.epochs_per_day
        period = self._rule.period_epochs(a_day)
        return max(1, self._limits.units_per_day * period // a_day)

    @property
    def eps_per_day(self) -> float | None:
        """Return what the rule's noise may cost one tenant in a day; None where there is none."""
        return self._rule.eps_total(self.units_per_period, self._limits.epochs_per_day)

    def keep_to(self, version: str) -> bool:
        """Drop votes and snapshot where others than the rules in force cleared them; tell so."""
        if version == self._state.version:
            return False
        if self._state.version:  # there were some
            log.warning("the detector's rules changed: votes and shared pages begin anew")
        self._state = renewed(self._state, version)
        return True

    def count(self, ballots: Sequence[Ballot], closed: int, now: int) -> None:
        """Count the ballots of an epoch that was closed; what is public in epoch `now` follows."""
        ledger, rule = self._state.ledger, self._rule
        period = rule.period_epochs(self._limits.epochs_per_day)
        changed = ledger.cast(ballots, closed, closed // period, self.units_per_period)
        decided = rule.decide(ledger.units, changed, closed, now)
        self._state.snapshot = advance(self._state.snapshot, decided, now)
        ledger.expire(now - rule.life_epochs)
        self._save()

    def take(self, state: bytes, version: str) -> None:
        """Take what was counted elsewhere; nothing of it stands that other rules cleared."""
        self._state = decode_state(state, version, self._limits.unit_pages)

    def encoded(self) -> bytes:
        """Return the state for others to take."""
        return encode_state(self._state)

    def forget(self, voter: str) -> int:
        """Drop a voter's votes for all decisions to come; return how many."""
        return self._state.ledger.forget(voter)

    def _save(self) -> None:
        """Keep the state; where that fails, a restart begins with older votes or none."""
        try:
            self._store.save(self.encoded())
        except OSError as error:
            log.warning("votes could not be saved: %s", type(error).__name__)
