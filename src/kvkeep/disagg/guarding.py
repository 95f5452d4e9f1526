"""The guard of a cluster's tenants: one history for each, wherever its requests are answered.

Whoever leads the workers draws which requests carry a shadow, hears what shadows have said, and
tells with each request how far its tenant has stepped back: both of its workers store its pages
alike. All of it is a function of a tenant's own requests, in the order they were submitted, as in
one engine. A request whose epoch follows from samples that are still running waits here, and its
tenant's later ones behind it: where that ends is not left to who is faster.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from kvkeep.engine.api import GenerateRequest, ModelInfo, TenantTerms
from kvkeep.engine.choosing import KEPT, controller_of
from kvkeep.engine.client import Verdict
from kvkeep.engine.guard import Ticket, guard_of
from kvkeep.engine.guarded import Guarded, GuardUse, Said
from kvkeep.engine.options import EngineOptions

Hear = Callable[["Turn", tuple[Said, ...]], None]


class Turn:
    """One request's place in its tenant's history."""

    def __init__(self, tenant: str, ticket: Ticket, hear: Hear) -> None:
        """`hear` is told once what its shadow has said, if it has one."""
        self.tenant = tenant
        self.ticket = ticket
        self._hear = hear
        self._steps_back = 0
        self._comes = asyncio.Event()
        self._runs = False

    async def comes(self) -> Guarded:
        """Return what its next worker is told, once it is known how far its tenant stepped back.

        The first one alone runs its shadow.
        """
        await self._comes.wait()
        sample = self.ticket.sample
        return Guarded(
            steps_back=self._steps_back,
            number=0 if sample is None else sample.number,
            sampled=sample is not None and not sample.settled and not self._runs,
        )

    def admit(self, steps_back: int) -> None:
        """Let it begin."""
        self._steps_back = steps_back
        self._comes.set()

    def runs(self, verdict: Verdict) -> None:
        """Say that a worker has taken it up with its shadow."""
        self._runs = True
        verdict.add_done_callback(
            lambda told: self._hear(self, () if told.cancelled() else told.result())
        )

    def leave(self) -> None:
        """Say that no worker has it now: a shadow that none has begun says nothing."""
        if not self._runs:
            self._hear(self, ())


class Guarding:
    """Every tenant's guard; used inside one event loop."""

    def __init__(self, options: EngineOptions, info: ModelInfo) -> None:
        """`options` are those of the workers; `options.guard_state` is kept here alone."""
        self._evicts = options.evict != "off"
        names = (KEPT,) if options.kv == "bf16" else ("coded", KEPT)
        self._controller = controller_of(options, names, info.uncoded_bytes_per_token)
        self._guard = guard_of(options, KEPT, len(names) - 1 + self._evicts)
        self._guard.asleep = False
        self._terms: Mapping[str, TenantTerms] = {}
        self._tenants: frozenset[str] = frozenset()
        self._waiting: dict[str, deque[Turn]] = {}

    def settle(self, tenants: Iterable[str], terms: Mapping[str, TenantTerms]) -> None:
        """Take the tenants there are and their terms; those that leave are forgotten."""
        now = frozenset(tenants)
        for tenant in self._tenants - now:
            self._guard.forget(tenant)
            for turn in self._waiting.pop(tenant, ()):
                turn.admit(0)  # the worker tells it that there is no such tenant
        self._tenants, self._terms = now, terms

    def enter(self, request: GenerateRequest) -> Turn:
        """Give a request its place, once, as it is submitted."""
        tenant = request.tenant
        ticket = Ticket(0, None)
        if self._drifts(request):
            can = not request.params.use_beam_search
            ticket = self._guard.enter(tenant, 0, 1, can=can)
        turn = Turn(tenant, ticket, self._hear)
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._admit(tenant)
        return turn

    def stats(self) -> tuple[GuardUse, ...]:
        """Return each tenant's figures, for the operator."""
        return self._guard.stats()

    def _drifts(self, request: GenerateRequest) -> bool:
        """Tell whether a request's answer could differ from that of 16-bit pages and no eviction.

        Read are its length and its tenant's terms, by the rule that its workers choose by.
        """
        terms = self._terms.get(request.tenant)
        if self._evicts and request.evict and (terms is None or terms.evict):
            return True
        form = self._controller.choose(
            len(request.prompt_ids),
            request.params.max_tokens,
            may_code=terms is None or terms.coded,
        )
        return form != KEPT

    def _hear(self, turn: Turn, said: tuple[Said, ...]) -> None:
        self._guard.hear(turn.ticket, said)
        waiting = self._waiting.get(turn.tenant, deque())
        if turn in waiting:
            waiting.remove(turn)
        self._admit(turn.tenant)

    def _admit(self, tenant: str) -> None:
        """Let a tenant's requests begin, in order, as far as what they follow from is known."""
        waiting = self._waiting.get(tenant, deque())
        while waiting:
            steps_back = self._guard.floor(tenant, waiting[0].ticket.epoch)
            if steps_back is None:
                return
            waiting.popleft().admit(steps_back)
        self._waiting.pop(tenant, None)


def guarding_of(options: EngineOptions | None, info: ModelInfo) -> Guarding | None:
    """Return the guard of a cluster, where it has one; raises `ConfigError`."""
    return Guarding(options, info) if options is not None and options.guard_share else None
