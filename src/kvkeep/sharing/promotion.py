"""From private to public: offers are scanned, votes counted, snapshots published.

    offer ──> queue ──> scan ──> ballot ──┐ end of the next epoch
    (epoch e)   (one per tenant)          └──> votes ──> rule ──> snapshot, fixed for an epoch

Nothing a tenant sends is seen by another before enough others have sent it too, whatever the
detector says: a miss costs nothing while fewer than the rule asks for hold the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvkeep.sharing.inspection import DecodeText, Inspector, cleared_units
from kvkeep.sharing.ledger import Ballot, UnitRef
from kvkeep.sharing.members import Directory
from kvkeep.sharing.monitor import Monitor
from kvkeep.sharing.pins import Pins
from kvkeep.sharing.rules import Rule
from kvkeep.sharing.scans import ScanJob, ScanQueue
from kvkeep.sharing.state import StateStore
from kvkeep.sharing.votes import PromotionLimits, Votes
from kvkeep.sharing.worker import Worker, read_one
from kvkeep.types import PAGE_TOKENS, Access, Chain, EpochDelta


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
        self._votes = Votes(parts.rule, limits, parts.store, parts.inspector.version)
        self._told = self._votes.snapshot
        """What the caches were told to be public."""
        self._epoch = max(self._told.epoch, limits.epoch_at(clock()))
        self.scans = ScanQueue(limits.scans)
        self._worker = Worker(self.scans, self._read) if threaded else None

    @property
    def epoch(self) -> int:
        """Return the number of the epoch that runs."""
        return self._epoch

    @property
    def public_units(self) -> int:
        """Return the units that are public in this epoch."""
        return len(self._votes.snapshot.entries)

    @property
    def units_per_period(self) -> int:
        """Return the new units a tenant may vote for before votes cost anew."""
        return self._votes.units_per_period

    @property
    def eps_per_day(self) -> float | None:
        """Return what the rule's noise may cost one tenant in a day; None where there is none."""
        return self._votes.eps_per_day

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return the leading pages that are pinned or that enough others than the tenant sent."""
        pages = self._parts.pins.leading(chain)
        member = self._parts.directory.consumer(tenant)
        if member is None or self._parts.monitor.falls_back(member.voter):
            return pages
        step, snapshot = self._limits.unit_pages, self._votes.snapshot
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
        known, tainted = self._votes.ledger.known(member.voter, member.group, units)
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
        closed = self._epoch
        ballots = self.close_epoch(self._limits.next_epoch(closed, now))
        self._votes.count(ballots, closed, self._epoch)
        return self._delta()

    def close_epoch(self, epoch: int) -> list[Ballot]:
        """Let another epoch begin; return the ballots of the one before that which ends.

        Where the inspector's rules have changed, nothing that was read under others stands.
        """
        self._keep_to_the_rules()
        if self._worker is None:
            while read_one(self.scans, self._read):
                pass
        else:
            self._worker.ensure()
        closed, self._epoch = self._epoch, max(self._epoch + 1, epoch)
        return self.scans.collect(closed - 1)

    def publish(self, state: bytes) -> EpochDelta:
        """Make public what whoever counts for several engines has decided."""
        self._votes.take(state, self.version)
        return self._delta()

    @property
    def version(self) -> str:
        """Return that of the rules which prompts are read by."""
        return self._parts.inspector.version

    def forget(self, tenant: str) -> int:
        """Drop a tenant's votes for all decisions to come; what is public expires as it would."""
        voter = self._parts.directory.voter(tenant)
        self.scans.forget(voter)
        self._parts.monitor.forget(voter)
        return self._votes.forget(voter)

    def close(self) -> None:
        """End the scanning thread."""
        if self._worker is not None:
            self._worker.close()

    def _delta(self) -> EpochDelta:
        """Return what is public now, and what no longer is."""
        old, self._told = self._told.pages(), self._votes.snapshot
        pages = self._told.pages()
        return EpochDelta(self._told.epoch, tuple(pages), tuple(p for p in old if p not in pages))

    def _keep_to_the_rules(self) -> None:
        """Drop offers, votes and the snapshot where others than the rules in force cleared them."""
        if self._votes.keep_to(self.version):
            self.scans.clear()

    def _read(self, job: ScanJob) -> int:
        unit_tokens = self._limits.unit_pages * PAGE_TOKENS
        parts = self._parts
        return cleared_units(job.token_ids, unit_tokens, parts.decode, parts.inspector, job.known)
