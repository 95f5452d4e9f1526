"""Prompts on their way through the detector: a queue and a budget for each tenant of its own."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

from kvkeep.sharing.ledger import Ballot, UnitRef
from kvkeep.types import Int32Array

LATE_EPOCHS = 3
"""How long a tenant's ballots of an epoch wait for a scan of its own that does not end."""


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
    tainted: int | None = None
    """The first unit known to be tainted, which no reading of it clears."""

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

    A tenant's limits are its own: another's jobs can neither fill its queue nor use its budget,
    and its ballots wait for no scan but its own.
    """

    def __init__(self, limits: ScanLimits) -> None:
        self._limits = limits
        self._ready = threading.Condition()
        self._waiting: dict[str, deque[ScanJob]] = {}
        self._queued: Counter[str] = Counter()
        self._spent: Counter[tuple[str, int]] = Counter()
        self._open: Counter[tuple[str, int]] = Counter()
        """Jobs that have not ended, by voter and epoch."""
        self._done: dict[tuple[str, int], list[Ballot]] = {}
        self._reading: dict[int, ScanJob] = {}
        """Jobs taken, by identity; what is not here any more counts for nothing."""
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
            self._open[voter, job.epoch] += 1
            self._waiting.setdefault(voter, deque()).append(job)
            self._ready.notify()
            return True

    def settle(self, ballot: Ballot, epoch: int) -> None:
        """Add a ballot that needs no scan."""
        with self._ready:
            self._done.setdefault((ballot.voter, epoch), []).append(ballot)

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
            self._reading[id(job)] = job
            return job

    def finish(self, job: ScanJob, cleared: int) -> None:
        """Say how many leading units of a job are clear; 0 for any doubt."""
        if job.tainted is not None:
            cleared = min(cleared, job.tainted)
        tainted = job.units[cleared] if cleared < len(job.units) else None
        ballot = Ballot(job.voter, job.group, job.units[:cleared], tainted)
        with self._ready:
            self.counts.scanned_bytes[job.voter] += job.cost_bytes
            self.counts.doubtful[job.voter] += tainted is not None
            if self._reading.pop(id(job), None) is not None:
                self._open[job.voter, job.epoch] -= 1
                self._done.setdefault((job.voter, job.epoch), []).append(ballot)

    def give_up(self, job: ScanJob) -> None:
        """End a job without a verdict: it says nothing, now or later."""
        with self._ready:
            self.counts.dropped[job.voter] += 1
            if self._reading.pop(id(job), None) is not None:
                self._open[job.voter, job.epoch] -= 1

    def collect(self, epoch: int) -> list[Ballot]:
        """Return each voter's ballots of the epochs up to one, in time order.

        An epoch of a voter is waited for as a whole, so that no place in its queue decides what it
        votes for; others' scans are not waited for.
        """
        with self._ready:
            ballots: list[Ballot] = []
            late: set[str] = set()
            for voter, number in sorted({*self._done, *self._open}):
                if number > epoch or voter in late:
                    continue
                if self._open[voter, number] > 0 and number > epoch - LATE_EPOCHS:
                    late.add(voter)
                    continue
                ballots += self._done.pop((voter, number), [])
                if self._open[voter, number] <= 0:
                    del self._open[voter, number]
            self._spent = Counter({k: v for k, v in self._spent.items() if k[1] >= epoch})
            return ballots

    def forget(self, voter: str) -> None:
        """Drop what a tenant has waiting, being read and decided."""
        with self._ready:
            self._waiting.pop(voter, None)
            del self._queued[voter]
            self._reading = {i: job for i, job in self._reading.items() if job.voter != voter}
            self._open = Counter({k: n for k, n in self._open.items() if k[0] != voter})
            self._done = {k: ballots for k, ballots in self._done.items() if k[0] != voter}

    def clear(self) -> None:
        """Drop what all tenants have waiting, being read and decided; budgets stay spent."""
        with self._ready:
            for found in (self._waiting, self._queued, self._reading, self._open, self._done):
                found.clear()
