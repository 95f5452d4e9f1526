"""An engine out of many workers: any number compute prompts, any number answer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Self

import msgspec

from kvkeep.disagg.agreed import Agreement, agreement_of
from kvkeep.disagg.crew import Crew
from kvkeep.disagg.guarding import Guarding, guarding_of
from kvkeep.disagg.journey import Journey
from kvkeep.disagg.members import CrewOptions, Launch, Member
from kvkeep.disagg.options import Role
from kvkeep.disagg.router import KEY_BYTES
from kvkeep.disagg.scaling import scale_by_load
from kvkeep.disagg.totals import total, with_prompts
from kvkeep.engine.api import (
    ChunkStream,
    EngineStats,
    GenerateRequest,
    ModelInfo,
    Purged,
    TenantTerms,
)
from kvkeep.engine.options import EngineOptions, SharingOptions
from kvkeep.errors import ConfigError, EngineError, EngineStopped


class Fleet:
    """An `EngineClient` over a cluster's workers."""

    def __init__(
        self, crew: Crew, agreement: Agreement | None = None, guarding: Guarding | None = None
    ) -> None:
        """`agreement` counts all workers' votes; None: they have none, or each counts its own.

        `guarding` is the tenants' guard; None: they have none.
        """
        self.crew = crew
        self.agreement = agreement
        self.guarding = guarding
        self._journeys: dict[str, Journey] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    @classmethod
    async def start(
        cls,
        launch: Launch,
        options: CrewOptions,
        key: bytes | None = None,
        share: SharingOptions | None = None,
        guard: EngineOptions | None = None,
    ) -> Self:
        """Return a cluster whose workers are warm; raises what the first one failed with.

        `share`: what their votes are counted by, where they are started as led ones; `guard`: what
        their tenants are guarded by, where they are started so.
        """
        crew = Crew(launch, secrets.token_bytes(KEY_BYTES) if key is None else key, options)
        agreement = agreement_of(share, crew)
        await crew.start()
        try:
            guarding = guarding_of(guard, crew.info)
        except ConfigError:
            await crew.close()
            raise
        if agreement is not None:
            crew.beside(agreement.run())
        if options.scaling:
            crew.beside(scale_by_load(crew))
        return cls(crew, agreement, guarding)

    def submit(self, request: GenerateRequest) -> ChunkStream:
        """Start a request; closing the stream early ends it wherever it runs."""
        if self._closing:
            raise EngineStopped("the cluster is shutting down")
        if request.id in self._journeys:
            raise EngineError("a request with this id is already running")
        if request.params.seed is None:  # whoever goes on with it draws the same
            params = msgspec.structs.replace(request.params, seed=secrets.randbits(63))
            request = msgspec.structs.replace(request, params=params)
        turn = None if self.guarding is None else self.guarding.enter(request)
        journey = self._journeys[request.id] = Journey(request, self.crew, self._ended, turn)
        self._idle.clear()
        return journey

    async def info(self) -> ModelInfo:
        """Return the model's description."""
        return self.crew.info

    async def stats(self) -> EngineStats:
        """Return the workers' figures as one engine's that answers, and each worker's state."""
        if self._closing:
            raise EngineStopped("the cluster is shutting down")
        serving = list(self.crew.serving())
        found = await asyncio.gather(*[self._figures(member) for member in serving])
        by_role: dict[Role, list[EngineStats]] = {"prefill": [], "decode": []}
        for member, figures in zip(serving, found, strict=True):
            if figures is not None:
                by_role[member.role].append(figures)
        uses = tuple(member.use(self.crew.epoch) for member in self.crew.members.values())
        agreed = self.agreement is not None
        told = with_prompts(total(by_role["decode"], uses, agreed=agreed), by_role["prefill"])
        guard = () if self.guarding is None else self.guarding.stats()
        return msgspec.structs.replace(told, guard=guard)

    async def set_tenants(
        self, quotas: dict[str, float], terms: dict[str, TenantTerms] | None = None
    ) -> None:
        """Set each tenant's share and terms on all workers, and on those that come later."""
        self.crew.settled = (quotas, terms)
        if self.agreement is not None:
            self.agreement.settle(terms or {})
        if self.guarding is not None:
            self.guarding.settle(quotas, terms or {})
        await asyncio.gather(*[self._set(member, quotas, terms) for member in self.crew.serving()])

    async def purge(self, tenant: str) -> Purged:
        """Drop a tenant's cached pages and votes on all workers."""
        for journey in self._journeys.values():
            if journey.request.tenant == tenant:
                journey.purged()
        agreed = None if self.agreement is None else self.agreement.forget(tenant)
        gone = await asyncio.gather(
            *[self._purge(member, tenant) for member in self.crew.serving()]
        )
        votes = sum(one.votes for one in gone) if agreed is None else agreed
        return Purged(pages=sum(one.pages for one in gone), votes=votes)

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Stop taking requests, wait up to `drain_s` for those running, and end all workers."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        await self.crew.close()

    def _ended(self, journey: Journey) -> None:
        self._journeys.pop(journey.request.id, None)
        if not self._journeys:
            self._idle.set()

    async def _figures(self, member: Member) -> EngineStats | None:
        """Return a worker's figures; its last ones where it takes its time."""
        try:
            async with asyncio.timeout(self.crew.options.beat_s):
                return await member.client.stats()
        except (EngineError, TimeoutError):
            return member.stats

    async def _set(
        self, member: Member, quotas: dict[str, float], terms: dict[str, TenantTerms] | None
    ) -> None:
        try:
            await member.client.set_tenants(quotas, terms)
        except EngineError as error:
            self.crew.lost(member, error)

    async def _purge(self, member: Member, tenant: str) -> Purged:
        """Purge one worker; a dead one holds nothing."""
        try:
            return await member.client.purge(tenant)
        except EngineError as error:
            self.crew.lost(member, error)
            return Purged(pages=0, votes=0)
