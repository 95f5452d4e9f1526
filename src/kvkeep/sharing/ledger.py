"""Votes: which tenants sent which unit of a chain, how lately, and how many each may cast.

A unit is a fixed number of consecutive pages. Every entry belongs to one group, so a vote counts
where its tenant shares. Whatever is decided for a voter's ballots reads that voter's past alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

EPOCH_SHARE = 4
"""An epoch may use one part in this many of what is left of a voter's period."""

Key = tuple[str, bytes]
"""Group and unit."""


class UnitRef(NamedTuple):
    """One unit of a chain, named by its last page."""

    pages: tuple[bytes, ...]
    above: bytes | None
    """The unit it continues; None for a chain's first."""
    depth: int

    @property
    def name(self) -> bytes:
        """Return the chain hash of its last page."""
        return self.pages[-1]


class Ballot(NamedTuple):
    """The leading units of one prompt that its voter's own scan has cleared."""

    voter: str
    group: str
    units: tuple[UnitRef, ...]
    tainted: UnitRef | None = None
    """The unit after them, where the scan stopped."""


class Known(NamedTuple):
    """What a voter's past says of a chain, in leading units; at most all of them."""

    cleared: int
    """Its own votes for them stand."""
    tainted: int
    """The next one is tainted, or there is none."""


class Unit(msgspec.Struct):
    """A unit that was voted for; epochs of each voter's last confirmation."""

    pages: tuple[bytes, ...]
    above: bytes | None
    depth: int
    votes: dict[str, int]


class Spending(msgspec.Struct):
    """What one voter has cast in one period, and what its scans have tainted."""

    period: int = -1
    units: set[Key] = msgspec.field(default_factory=set)
    tainted: dict[bytes, int] = msgspec.field(default_factory=dict)


class Ledger(msgspec.Struct):
    """All votes that can still count."""

    units: dict[Key, Unit] = msgspec.field(default_factory=dict)
    voters: dict[str, Spending] = msgspec.field(default_factory=dict)

    def cast(self, ballots: Iterable[Ballot], epoch: int, period: int, bound: int) -> set[Key]:
        """Count ballots as of `epoch`; return the units whose votes changed.

        A voter casts at most `bound` votes for new units per period, and at most a part of what is
        left of them per epoch: those it sent most often first, then the shallow ones. What it cast
        in this period already is confirmed without limit.
        """
        touched: set[Key] = set()
        by_voter: dict[str, list[Ballot]] = {}
        for ballot in ballots:
            by_voter.setdefault(ballot.voter, []).append(ballot)
        for voter, own in by_voter.items():
            spending = self.voters.setdefault(voter, Spending())
            if spending.period != period:
                spending.period = period
                spending.units.clear()
            for ballot in own:
                self._taint(voter, spending, ballot, bound)
            sent = self._clean(spending, own)
            for key, ref in _within(spending, sent, bound):
                spending.units.add(key)
                unit = self.units.setdefault(key, Unit(ref.pages, ref.above, ref.depth, {}))
                unit.votes[voter] = epoch
                touched.add(key)
        return touched

    def knows(self, voter: str, group: str, unit: bytes) -> bool:
        """Tell whether the voter's own vote for a unit still stands."""
        found = self.units.get((group, unit))
        return found is not None and voter in found.votes

    def known(self, voter: str, group: str, units: Sequence[UnitRef]) -> Known:
        """Return how far a chain's units need no scan, and where the voter's own taint begins."""
        spending = self.voters.get(voter)
        taints = spending.tainted if spending is not None else {}
        tainted = next((i for i, unit in enumerate(units) if unit.name in taints), len(units))
        whole = units[:tainted]
        unknown = (i for i, unit in enumerate(whole) if not self.knows(voter, group, unit.name))
        return Known(next(unknown, tainted), tainted)

    def expire(self, before: int) -> None:
        """Drop votes last confirmed before an epoch."""
        for key, unit in list(self.units.items()):
            unit.votes = {voter: at for voter, at in unit.votes.items() if at >= before}
            if not unit.votes:
                del self.units[key]

    def forget(self, voter: str) -> int:
        """Drop a voter's votes and everything else about it; return how many votes."""
        self.voters.pop(voter, None)
        count = 0
        for key, unit in list(self.units.items()):
            count += unit.votes.pop(voter, None) is not None
            if not unit.votes:
                del self.units[key]
        return count

    def _taint(self, voter: str, spending: Spending, ballot: Ballot, bound: int) -> None:
        """Note where a scan stopped: this voter's vote for it, and below, never counts again."""
        if ballot.tainted is None:
            return
        name = ballot.tainted.name
        spending.tainted.pop(name, None)
        spending.tainted[name] = ballot.tainted.depth
        while len(spending.tainted) > bound:
            del spending.tainted[next(iter(spending.tainted))]
        if self.knows(voter, ballot.group, name):
            self._retract(voter, ballot.group, name)

    def _retract(self, voter: str, group: str, name: bytes) -> None:
        """Take back a voter's votes for a unit and all below it."""
        below = {name}
        for key, unit in sorted(self.units.items(), key=lambda item: item[1].depth):
            if key[0] != group or (key[1] != name and unit.above not in below):
                continue
            below.add(key[1])
            unit.votes.pop(voter, None)
            if not unit.votes:
                del self.units[key]

    def _clean(self, spending: Spending, ballots: list[Ballot]) -> dict[Key, tuple[UnitRef, int]]:
        """Return the units above every taint with how often they were sent."""
        refs: dict[Key, UnitRef] = {}
        times: Counter[Key] = Counter()
        for ballot in ballots:
            for ref in ballot.units:
                if ref.name in spending.tainted:
                    break
                refs.setdefault((ballot.group, ref.name), ref)
                times[ballot.group, ref.name] += 1
        return {key: (ref, times[key]) for key, ref in refs.items()}


def _within(
    spending: Spending, sent: dict[Key, tuple[UnitRef, int]], bound: int
) -> list[tuple[Key, UnitRef]]:
    """Return the units that the voter's bound allows, ancestors before descendants."""
    known = [(key, ref) for key, (ref, _) in sent.items() if key in spending.units]
    fresh = [(key, ref, n) for key, (ref, n) in sent.items() if key not in spending.units]
    fresh.sort(key=lambda item: (-item[2], item[1].depth))
    left = bound - len(spending.units)
    allowed = min(left, -(-left // EPOCH_SHARE))
    return known + [(key, ref) for key, ref, _ in fresh[: max(allowed, 0)]]
