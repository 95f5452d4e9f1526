"""From private to public: offers are scanned, votes counted, snapshots published.

    offer ──> queue ──> scan ──> ballot ──┐ end of the next epoch
    (epoch e)   (one per tenant)          └──> votes ──> rule ──> snapshot, fixed for an epoch

Nothing a tenant sends is seen by another before enough others have sent it too, whatever the
detector says: a miss costs nothing while fewer than the rule asks for hold the text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvkeep.errors import ConfigError
from kvkeep.sharing.inspection import DecodeText, Inspector, cleared_units
from kvkeep.sharing.ledger import Ballot, UnitRef
from kvkeep.sharing.members import Directory
from kvkeep.sharing.monitor import Monitor
from kvkeep.sharing.pins import Pins
from kvkeep.sharing.rules import Rule
from kvkeep.sharing.scans import ScanJob, ScanLimits, ScanQueue
from kvkeep.sharing.snapshot import advance
from kvkeep.sharing.state import StateStore, decode_state, encode_state, renewed
from kvkeep.sharing.worker import Worker, read_one
from kvkeep.types import PAGE_TOKENS, Access, Chain, EpochDelta

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


@dataclass(frozen=True, slots=True)
class PromotionParts:
    """What promotion is made of; all of it comes from outside."""

    rule: Rule
    directory: Directory
    decode: DecodeText
    inspector: Inspector
    store: StateStore
    monitor: Monitor
    pins: Pins


class Promotion:
    """A sharing policy that publishes at epochs' ends what its rule allows.

    One thread calls it, beside the scanning one.
    """

    at_once = False
    by_scope = False

    def __init__(
        self,
        parts: PromotionParts,
        limits: PromotionLimits,
        *,
        threaded: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`threaded`: scan in a thread; otherwise at an epoch's end, before it is decided."""
        self._parts = parts
        self._limits = limits
        self._state = decode_state(parts.store.load(), parts.inspector.version, limits.unit_pages)
        self._epoch = max(self._state.snapshot.epoch, int(clock() // limits.epoch_s))
        self.scans = ScanQueue(limits.scans)
        self._worker = Worker(self.scans, self._read) if threaded else None

    @property
    def epoch(self) -> int:
        """Return the number of the epoch that runs."""
        return self._epoch

    @property
    def public_units(self) -> int:
        """Return the units that are public in this epoch."""
        return len(self._state.snapshot.entries)

    @property
    def units_per_period(self) -> int:
        """Return the new units a tenant may vote for before votes cost anew."""
        a_day = self._limits.epochs_per_day
        period = self._parts.rule.period_epochs(a_day)
        return max(1, self._limits.units_per_day * period // a_day)

    @property
    def eps_per_day(self) -> float | None:
        """Return what the rule's noise may cost one tenant in a day; None where there is none."""
        return self._parts.rule.eps_total(self.units_per_period, self._limits.epochs_per_day)

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return the leading pages that are pinned or that enough others than the tenant sent."""
        pages = self._parts.pins.leading(chain)
        member = self._parts.directory.consumer(tenant)
        if member is None or self._parts.monitor.falls_back(member.voter):
            return pages
        step, snapshot = self._limits.unit_pages, self._state.snapshot
        for end in range(step, len(chain) + 1, step):
            if end <= pages:
                continue
            if not snapshot.readable(member.group, chain[end - 1], member.voter):
                break
            pages = end
        return pages

    def offer(self, chain: Chain, tenant: str) -> None:
        """Queue a prompt's whole units for their scan; what is not a member's is ignored."""
        member = self._parts.directory.contributor(tenant)
        step = self._limits.unit_pages
        count = len(chain) // step
        if member is None or count == 0:
            return
        names = tuple(chain[: count * step])
        units = tuple(
            UnitRef(names[i * step : (i + 1) * step], names[i * step - 1] if i else None, i)
            for i in range(count)
        )
        known, tainted = self._state.ledger.known(member.voter, member.group, units)
        if known in (count, tainted):
            if known:
                self.scans.settle(Ballot(member.voter, member.group, units[:known]), self._epoch)
            return
        units = units[: tainted + 1]  # what lies below a taint stays private, whatever it says
        tokens = chain.token_ids()[: len(units) * step * PAGE_TOKENS].copy()
        limit = tainted if tainted < count else None
        job = ScanJob(member.voter, member.group, self._epoch, units, tokens, known, limit)
        if self.scans.put(job) and self._worker is not None:
            self._worker.ensure()

    def observe(self, access: Access) -> None:
        """Pass what a prompt hit on to the monitor; what the operator pinned is nobody's secret."""
        chain = access.public_chain
        if self._parts.pins.leading(chain) == len(chain):
            access = replace(access, public_chain=())
        self._parts.monitor.observe(access, self._parts.directory.voter(access.tenant))

    def end_epoch(self, now: float) -> EpochDelta:
        """Count the votes of the epoch before this one and publish the next epoch's snapshot.

        Where the inspector's rules have changed, nothing that was read under others stands.
        """
        old = self._state.snapshot
        self._keep_to_the_rules()
        if self._worker is None:
            while read_one(self.scans, self._read):
                pass
        else:
            self._worker.ensure()
        closed = self._epoch
        self._epoch = max(closed + 1, int(now // self._limits.epoch_s))
        ledger, rule = self._state.ledger, self._parts.rule
        period = rule.period_epochs(self._limits.epochs_per_day)
        ballots = self.scans.collect(closed - 1)
        changed = ledger.cast(ballots, closed, closed // period, self.units_per_period)
        decided = rule.decide(ledger.units, changed, closed, self._epoch)
        snapshot = advance(self._state.snapshot, decided, self._epoch)
        ledger.expire(self._epoch - rule.life_epochs)
        self._state.snapshot = snapshot
        self._save()
        pages = snapshot.pages()
        gone = tuple(page for page in old.pages() if page not in pages)
        return EpochDelta(self._epoch, tuple(pages), gone)

    def forget(self, tenant: str) -> int:
        """Drop a tenant's votes for all decisions to come; what is public expires as it would."""
        voter = self._parts.directory.voter(tenant)
        self.scans.forget(voter)
        self._parts.monitor.forget(voter)
        return self._state.ledger.forget(voter)

    def close(self) -> None:
        """End the scanning thread."""
        if self._worker is not None:
            self._worker.close()

    def _keep_to_the_rules(self) -> None:
        """Drop offers, votes and the snapshot where others than the rules in force cleared them."""
        version = self._parts.inspector.version
        if version != self._state.version:
            log.warning("the detector's rules changed: votes and shared pages begin anew")
            self.scans.clear()
            self._state = renewed(self._state, version)

    def _save(self) -> None:
        """Keep the state; where that fails, a restart begins with older votes or none."""
        try:
            self._parts.store.save(encode_state(self._state))
        except OSError as error:
            log.warning("votes could not be saved: %s", type(error).__name__)

    def _read(self, job: ScanJob) -> int:
        unit_tokens = self._limits.unit_pages * PAGE_TOKENS
        parts = self._parts
        return cleared_units(job.token_ids, unit_tokens, parts.decode, parts.inspector, job.known)
