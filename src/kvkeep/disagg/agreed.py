"""What is public is the same on all workers: their votes are counted as one.

At an epoch's end each worker hands over what its tenants' prompts have voted for: names of chains
and of voters, no content. Whoever leads them counts the ballots of all, a voter's once, and hands
every worker the same state: from that epoch on each publishes what of it it holds. A worker that
is lost does not contribute. Where workers' rules differ, nothing is public until they agree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping

from kvkeep.disagg.crew import Crew
from kvkeep.disagg.members import Member as Worker
from kvkeep.engine import messages as m
from kvkeep.engine.api import TenantTerms
from kvkeep.engine.options import SharingOptions
from kvkeep.engine.terms import leaving, limits_of, members_of, rule_of, store_of
from kvkeep.errors import EngineError, unexpected
from kvkeep.sharing.members import Directory, Member
from kvkeep.sharing.votes import Votes

DIFFERENT = "workers whose rules differ"
"""Stands for rules under which nothing is public."""

log = logging.getLogger(__name__)


class Agreement:
    """One count of all workers' votes; used inside one event loop."""

    def __init__(self, options: SharingOptions, crew: Crew) -> None:
        """`options.state` is where votes are kept over restarts; raises `ConfigError`."""
        self._limits = limits_of(options)
        self._votes = Votes(rule_of(options), self._limits, store_of(options))
        self._crew = crew
        self._members: dict[str, Member] = {}
        self._directory = Directory()
        self._left: set[str] = set()
        """Voters that were forgotten while ballots were on their way."""
        self.epoch = max(self._votes.snapshot.epoch, self._limits.epoch_at(time.time()))

    async def run(self) -> None:
        """End epochs for ever; where one can't be ended, nothing is public until one is."""
        while True:
            await asyncio.sleep(self._limits.epoch_s)
            now = time.time()
            try:
                await self.end_epoch(now)
            except Exception as error:  # noqa: BLE001 - doubt means private
                log.warning("votes can't be counted, so nothing is public: %s", unexpected(error))
                await self._withdraw(now)

    async def end_epoch(self, now: float) -> None:
        """Count what all workers have, and have them publish the same."""
        closed, self.epoch = self.epoch, self._limits.next_epoch(self.epoch, now)
        self._left.clear()
        workers = sorted(self._crew.serving(), key=lambda worker: worker.name)
        asked = await asyncio.gather(*[self._collect(worker, now) for worker in workers])
        found = [one for one in asked if one is not None]
        if not found:
            return
        versions = {one.version for one in found}
        ballots = [
            ballot
            for one in found
            for ballot in one.ballots
            if len(versions) == 1 and ballot.voter not in self._left
        ]
        self._votes.keep_to(versions.pop() if len(versions) == 1 else DIFFERENT)
        self._votes.count(ballots, closed, self.epoch)
        await self._hand_over(workers, now)

    def settle(self, terms: Mapping[str, TenantTerms]) -> None:
        """Take the terms of all accounts; votes of those that leave do not count."""
        members = members_of(terms)
        for account in leaving(self._members, members):
            self.forget(account)
        self._members = members
        self._directory.set(members)

    def forget(self, account: str) -> int:
        """Drop the votes of an account's voter; return how many."""
        voter = self._directory.voter(account)
        self._left.add(voter)
        return self._votes.forget(voter)

    async def _hand_over(self, workers: Iterable[Worker], now: float) -> None:
        """Have workers publish what is decided."""
        state = self._votes.encoded()
        await asyncio.gather(*[self._publish(worker, state, now) for worker in workers])

    async def _withdraw(self, now: float) -> None:
        """Have nothing public anywhere: a worker that can't be told so is lost."""
        workers = self._crew.serving()
        try:
            self._votes.keep_to(DIFFERENT)
            await self._hand_over(workers, now)
        except Exception as error:  # noqa: BLE001 - as above, and the next epoch must come
            for worker in workers:
                self._crew.lost(worker, f"it publishes what is not agreed: {unexpected(error)}")

    async def _collect(self, worker: Worker, now: float) -> m.Votes | None:
        try:
            async with asyncio.timeout(self._crew.options.silence_s):
                return await worker.client.close_epoch(self.epoch, now)
        except (EngineError, TimeoutError):
            return None

    async def _publish(self, worker: Worker, state: bytes, now: float) -> None:
        """Hand the state over; a worker that is lost begins with nothing public."""
        try:
            async with asyncio.timeout(self._crew.options.silence_s):
                await worker.client.publish(state, now)
        except (EngineError, TimeoutError) as error:
            self._crew.lost(worker, str(error) or "it does not publish what all others do")


def agreement_of(options: SharingOptions | None, crew: Crew) -> Agreement | None:
    """Return what counts votes, where workers do not themselves; raises `ConfigError`."""
    return Agreement(options, crew) if options is not None and options.led else None
