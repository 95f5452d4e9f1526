"""Prompts on their way through the detector: a queue and a budget for each tenant of its own."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

from kvkeep.sharing.ledger import Ballot, UnitRef
from kvkeep.types import Int32Array

LATE_EPOCHS = 3
"""How long an epoch's ballots wait for a scan that does not end."""


@dataclass(frozen=True, slots=True)
class ScanLimits:
    """What one tenant may have scanned; what exceeds it stays private."""

    queued_bytes: int = 4 << 20
    """Token ids that wait."""
    epoch_bytes: int = 128 << 10
    """Token ids scanned per epoch, beside what its earlier votes have cleared."""


@dataclass(frozen=True, slots=True)
class ScanJob:
    """One prompt to be read; `known` leading units need no reading to be clear."""

    voter: str
    group: str
    epoch: int
    units: tuple[UnitRef, ...]
    token_ids: Int32Array
    known: int

    @property
    def cost_bytes(self) -> int:
        """Return the bytes that count against the voter's limits."""
        read = len(self.units) - max(self.known - 1, 0)
        return self.token_ids.nbytes * read // len(self.units)


@dataclass(slots=True)
class ScanCounts:
    """What happened, by tenant; for the operator only."""

    scanned_bytes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    doubtful: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    seconds: float = 0.0
    """Processor time of reading."""


class ScanQueue:
    """Jobs in turn over tenants, first in first out within one; safe for several threads.

    A tenant's limits are its own: another's jobs can neither fill its queue nor use its budget.
    """

    def __init__(self, limits: ScanLimits) -> None:
        self._limits = limits
        self._ready = threading.Condition()
        self._waiting: dict[str, deque[ScanJob]] = {}
        self._queued: Counter[str] = Counter()
        self._spent: Counter[tuple[str, int]] = Counter()
        self._open: Counter[int] = Counter()
        self._done: dict[int, list[Ballot]] = {}
        self._reading: ScanJob | None = None
        self.counts = ScanCounts()

    def put(self, job: ScanJob) -> bool:
        """Queue a job; False where the tenant's queue or budget is full."""
        with self._ready:
            cost, voter = job.cost_bytes, job.voter
            spent = self._spent[voter, job.epoch] + cost
            over = self._queued[voter] + cost > self._limits.queued_bytes
            if over or spent > self._limits.epoch_bytes:
                self.counts.dropped[voter] += 1
                return False
            self._spent[voter, job.epoch] = spent
            self._queued[voter] += cost
            self._open[job.epoch] += 1
            self._waiting.setdefault(voter, deque()).append(job)
            self._ready.notify()
            return True

    def settle(self, ballot: Ballot, epoch: int) -> None:
        """Add a ballot that needs no scan."""
        with self._ready:
            self._done.setdefault(epoch, []).append(ballot)

    def take(self, wait_s: float = 0.0) -> ScanJob | None:
        """Return the next job, the tenants in turn; None where none came in time."""
        with self._ready:
            if not self._waiting:
                self._ready.wait(wait_s)
            if not self._waiting:
                return None
            voter = next(iter(self._waiting))
            jobs = self._waiting.pop(voter)
            job = jobs.popleft()
            if jobs:
                self._waiting[voter] = jobs
            self._queued[voter] -= job.cost_bytes
            self._reading = job
            return job

    def finish(self, job: ScanJob, cleared: int) -> None:
        """Say how many leading units of a job are clear; 0 for any doubt."""
        tainted = job.units[cleared] if cleared < len(job.units) else None
        ballot = Ballot(job.voter, job.group, job.units[:cleared], tainted)
        with self._ready:
            self.counts.scanned_bytes[job.voter] += job.cost_bytes
            self.counts.doubtful[job.voter] += tainted is not None
            self._open[job.epoch] -= 1
            if self._reading is job:
                self._done.setdefault(job.epoch, []).append(ballot)

    def give_up(self, job: ScanJob) -> None:
        """End a job without a verdict: it says nothing, now or later."""
        with self._ready:
            self.counts.dropped[job.voter] += 1
            self._open[job.epoch] -= 1

    def collect(self, epoch: int) -> list[Ballot]:
        """Return the ballots of all epochs up to one whose jobs have all ended, in time order.

        An epoch is waited for as a whole, so that nobody's place in the queues decides who votes.
        """
        with self._ready:
            ballots: list[Ballot] = []
            for number in sorted({*self._done, *self._open}):
                waits = self._open[number] > 0 and number > epoch - LATE_EPOCHS
                if number > epoch or waits:
                    break
                ballots += self._done.pop(number, [])
                if self._open[number] <= 0:
                    del self._open[number]
            self._spent = Counter({k: v for k, v in self._spent.items() if k[1] >= epoch})
            return ballots

    def forget(self, voter: str) -> None:
        """Drop what a tenant has waiting and decided."""
        with self._ready:
            for job in self._waiting.pop(voter, ()):
                self._open[job.epoch] -= 1
            del self._queued[voter]
            if self._reading is not None and self._reading.voter == voter:
                self._reading = None
            for epoch, ballots in self._done.items():
                self._done[epoch] = [b for b in ballots if b.voter != voter]
