"""Who runs in the next step: admit, continue the decodes, chunk the prefills, preempt.

Everything decided for a tenant's sequences reads that tenant's own queue, quota and history only;
other tenants decide how soon a step comes, never what it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvkeep.cache.caches import Caches
from kvkeep.cache.manager import CacheManager
from kvkeep.engine.apart import Part
from kvkeep.engine.fairness import DeficitRoundRobin
from kvkeep.engine.gate import TtftGate
from kvkeep.engine.handing import stands_by
from kvkeep.engine.limits import SchedulerLimits
from kvkeep.engine.packs import Packs
from kvkeep.engine.sequence import Request, Sequence, Status
from kvkeep.engine.shadows import Shadows, with_shadows
from kvkeep.engine.waiting import awaited, begin_fetch, fetch_early, matched, under_way
from kvkeep.engine.work import Lane, Planned, ViewKeeper, Work
from kvkeep.errors import CapacityError
from kvkeep.types import PAGE_TOKENS


@dataclass(slots=True)
class _Tenant:
    """One tenant's queue, oldest first, and its running sequences in order of admission."""

    max_running: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)


class Scheduler:
    """First in, first out within a tenant; deficit round robin between tenants."""

    def __init__(
        self,
        caches: Caches,
        limits: SchedulerLimits,
        exhausted: Callable[[Sequence], None],
        keeper: ViewKeeper,
        settle: Callable[[Request], bool],
        reads: Callable[[str], bool],
        gate: TtftGate | None = None,
    ) -> None:
        """`exhausted` hears of sequences too large for their quota.

        `settle` fixes the form of a request's pages, or tells that it must wait. `reads` tells of
        an account whether others' pages may serve it.
        """
        self._caches = caches
        self._limits = limits
        self._exhausted = exhausted
        self._keeper = keeper
        self._shadows = Shadows(caches, keeper)
        self._settle = settle
        self._reads = reads
        self._gate = gate
        self._tenants: dict[str, _Tenant] = {}
        self._robin = DeficitRoundRobin(limits.chunk_tokens)
        self.preemptions = 0
        self.packs = Packs(caches, keeper)

    def set_tenants(self, shares: Mapping[str, float]) -> None:
        """Set each tenant's part of the running sequences; tenants left out must have none."""
        for name, cap in self._limits.caps(shares).items():
            if name in self._tenants:
                self._tenants[name].max_running = cap
            else:
                self._tenants[name] = _Tenant(cap)
        for name in [n for n in self._tenants if n not in shares]:
            del self._tenants[name]
        for tenant in self._tenants.values():
            while self._limits.coded and len(tenant.running) > tenant.max_running:
                self._preempt(tenant, tenant.running[-1])
        self._robin.set_tenants(list(self._tenants))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind its tenant's others."""
        self._tenants[sequence.account].waiting.append(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Take over a forked sequence: running if it has a view, else first in its queue."""
        tenant = self._tenants[sequence.account]
        if sequence.view is not None:
            sequence.status = Status.RUNNING
            if sequence not in tenant.running:
                tenant.running.append(sequence)
        else:
            sequence.status = Status.WAITING
            if sequence in tenant.running:
                tenant.running.remove(sequence)
            tenant.waiting.appendleft(sequence)

    def follow(self, sequence: Sequence, source: Sequence) -> None:
        """Let a sequence without a view go on from where `source` stands.

        Full pages are shared, the open one is copied; it waits where there is no room for that.
        """
        tenant = self._tenants[sequence.account]
        full = self._limits.coded and len(tenant.running) >= tenant.max_running
        if source.view is not None and (sequence in tenant.running or not full):
            try:
                sequence.view = self._caches.of_view(source.view).fork(source.view)
            except CapacityError:
                sequence.view = None
            else:
                self._keeper.fork(source.view, sequence.view)
        self.adopt(sequence)

    def vacate(self, sequence: Sequence) -> None:
        """Release the view of a sequence that keeps its place for other tokens.

        Its open page is not worth keeping.
        """
        if sequence.view is not None:
            view, sequence.view = sequence.view, None
            self._keeper.forget(view)
            full = view.length - view.length % PAGE_TOKENS
            self._caches.of_view(view).release(view, sequence.tokens.ids(full))

    def park(self, sequence: Sequence) -> None:
        """Take a running sequence out of its tenant's lists; what it computed stays cached."""
        if sequence.status is Status.RUNNING:
            self._tenants[sequence.account].running.remove(sequence)
            self._release(sequence)
            sequence.status = Status.PARKED

    def resume(self, sequence: Sequence) -> None:
        """Queue a parked sequence; does nothing for others."""
        if sequence.status is Status.PARKED:
            self.adopt(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended or was cancelled, releasing its view."""
        tenant = self._tenants.get(sequence.account)
        if tenant is not None:
            if sequence in tenant.running:
                tenant.running.remove(sequence)
            elif sequence in tenant.waiting:
                tenant.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self._release(sequence)

    def restart(self, sequence: Sequence) -> None:
        """Have a running sequence computed again in its turn."""
        self._preempt(self._tenants[sequence.account], sequence)

    def counts(self, tenant: str) -> tuple[int, int]:
        """Return (running, waiting) sequences of a tenant."""
        own = self._tenants[tenant]
        return len(own.running), len(own.waiting)

    def has_work(self) -> bool:
        """Return whether any sequence is running or waiting."""
        return any(t.running or t.waiting for t in self._tenants.values())

    def schedule(self) -> list[Work]:
        """Return the next step's work: a row per decode, prefill chunks within the budget."""
        self._caches.poll()
        for name in sorted(self._tenants):
            self._admit(self._tenants[name])
            for sequence in list(self._tenants[name].running):
                self._pack(self._tenants[name], sequence)
        work = [w for name in sorted(self._tenants) for w in self._decodes(self._tenants[name])]
        planned: Planned = {}
        self._robin.spend(
            self._limits.max_num_batched_tokens,
            lambda name: _cost(self._next_chunk(self._tenants[name], planned)),
            lambda name: self._take_chunk(self._tenants[name], planned),
        )
        return with_shadows(work + [lane.work(end) for lane, end in planned.items()])

    def _admit(self, tenant: _Tenant) -> None:
        """Let those who wait run, in their order, past prompts that another engine computes."""
        passed: list[Sequence] = []
        for sequence in list(tenant.waiting):
            if sequence not in tenant.waiting or stands_by(sequence.request):
                continue
            if not self._settle(sequence.request):
                return
            if len(tenant.running) + len(passed) >= tenant.max_running:
                manager = self._caches.of(sequence.request.codec)
                fetch_early(sequence, (*tenant.running, *passed), manager)
                return
            if self._open(sequence, passed, alone=not (tenant.running or passed)):
                tenant.waiting.remove(sequence)
                tenant.running.append(sequence)
            elif under_way(sequence):
                passed.append(sequence)
            elif sequence in tenant.waiting:
                return

    def _open(self, sequence: Sequence, passed: list[Sequence], *, alone: bool) -> bool:
        """Match and lock the prefix, reserve room for the rest; False where it must wait."""
        request, tokens = sequence.request, sequence.tokens.ids()
        manager, spec = self._caches.of(request.codec), request.spec
        if sequence.fetch is not None:
            if not sequence.fetch.done or request.lacks:
                return False
            self._end_fetch(sequence)
        elif request.lacks and sequence.asked:
            return False
        if request.part is not None and request.part.state != "lost":
            return self._open_apart(sequence, request.part, alone=alone)
        if not alone and not self._shadows.fits(sequence):
            return False
        match = matched(sequence, manager)
        before = (*self._tenants[sequence.account].running, *passed)
        if not alone and awaited(sequence, before, match, manager):
            return False
        if match.pending and sequence.status is Status.WAITING:
            # What were fetched for half of it now would be computed later.
            room = manager.has_room(match, len(tokens))
            if not room and (not alone or self._take_back(sequence.account)):
                return False
            if begin_fetch(sequence, match, manager):
                return False
        sequence.asked = True
        if request.lacks:
            return False
        view = manager.open_view(
            match, len(tokens), answer_tokens=spec.params.max_tokens, heard_of=not request.is_probe
        )
        try:
            manager.extend(view, len(tokens) - view.length)
        except CapacityError:
            manager.release(view, tokens[:0])  # pages of a snapshot do not become its own
            if alone:
                self._end_if_alone(sequence, manager)
            return False
        if not self._shadows.cast(sequence, alone=alone):
            manager.release(view, tokens[:0])
            return False
        if not spec.store:
            view.taint(0)
        sequence.view = view
        sequence.hidden_hit = view.length > match.cached_tokens
        sequence.uncommitted = sequence.hidden_hit or self._reads(sequence.account)
        sequence.status = Status.RUNNING
        if self._gate is not None and sequence.opens_s is None:
            sequence.opens_s = self._gate.opens_s(match, len(tokens), account=sequence.account)
        if request.cached_tokens is None:
            request.cached_tokens = min(match.cached_tokens, sequence.prompt_len)
            request.saved_tokens = min(view.length, sequence.prompt_len)
        if request.codec in request.rows:
            self._keeper.go_on(view, request.rows[request.codec])
        return True

    def _open_apart(self, sequence: Sequence, part: Part, *, alone: bool) -> bool:
        """Reserve room for what is not held elsewhere, once that is there; False: not yet."""
        request, length = sequence.request, len(sequence.tokens)
        sequence.asked = True
        if part.state == "awaited" or request.awaits:
            return False
        at, scope = self._caches.of(request.codec), request.spec.scope
        try:
            view = at.reserve_view(length, account=sequence.account, scope=scope, apart=part.pages)
        except CapacityError:
            if alone:
                self._end_if_alone(sequence, at)
            return False
        sequence.view, sequence.status = view, Status.RUNNING
        if request.cached_tokens is None:
            request.cached_tokens = request.saved_tokens = view.length
        return True

    def _decodes(self, tenant: _Tenant) -> list[Work]:
        self._shadows.drop_served(tenant.running)
        work = []
        for sequence in list(tenant.running):
            if sequence.status is not Status.RUNNING or sequence.prefills():
                continue
            if self._make_room(tenant, sequence):
                work.append(Work(sequence, sequence.next_position(), 1))
        return [w for w in work if w.sequence.status is Status.RUNNING]

    def _make_room(self, tenant: _Tenant, sequence: Sequence) -> bool:
        """Find room for the next token, preempting the tenant's youngest; False: not now."""
        assert sequence.view is not None
        needed = len(sequence.tokens) - sequence.view.length
        while True:
            try:
                self._caches.of_view(sequence.view).extend(sequence.view, needed)
            except CapacityError:
                if self._take_back(sequence.account, early=True):
                    continue
                victim = tenant.running[-1]
                if victim is sequence and len(tenant.running) == 1:
                    if self._take_back(sequence.account):
                        continue
                    self._exhausted(sequence)
                    return False
                self._preempt(tenant, victim)
                if victim is sequence:
                    return False
            else:
                return True

    def _pack(self, tenant: _Tenant, sequence: Sequence) -> None:
        """Pack a sequence, preempting its tenant's youngest for room.

        One that finds none even alone keeps its pages, masked: how it goes on depends on nothing
        but its own tokens and its tenant's share.
        """
        while sequence in tenant.running and not self.packs.pack(sequence):
            if len(tenant.running) == 1:
                self.packs.give_up(sequence)
            else:
                self._preempt(tenant, tenant.running[-1])

    def _preempt(self, tenant: _Tenant, victim: Sequence) -> None:
        self.preemptions += 1
        tenant.running.remove(victim)
        self._release(victim)
        victim.status = Status.WAITING
        tenant.waiting.appendleft(victim)

    def _end_if_alone(self, sequence: Sequence, manager: CacheManager) -> None:
        """End a sequence that its share can't hold; not where pages that others hold come free."""
        if not self._take_back(sequence.account) and not manager.holds.pages(sequence.account):
            self._exhausted(sequence)

    def _take_back(self, account: str, *, early: bool = False) -> bool:
        """Let pages for those who wait make way; False where there are none.

        What came stays cached as long as there is room, and the rest is asked for again. `early`:
        only those that were to be fetched before their turn.
        """
        held = [one for one in self._tenants[account].waiting if one.looked or not early]
        waiting = [one for one in held if self._end_fetch(one)]
        for one in waiting:
            one.status, one.asked = Status.WAITING, False
        return bool(waiting)

    def _end_fetch(self, sequence: Sequence) -> bool:
        """Hold pages on their way up no longer; False where there are none."""
        fetch, sequence.fetch = sequence.fetch, None
        if fetch is not None:
            self._caches.of(sequence.request.codec).end_fetch(fetch)
        return fetch is not None

    def _release(self, sequence: Sequence) -> None:
        self._end_fetch(sequence)
        self._shadows.drop(sequence)
        if sequence.view is not None:
            self._keeper.forget(sequence.view)
            view, sequence.view = sequence.view, None
            known = 0 if sequence.uncommitted else view.length
            self._caches.of_view(view).release(view, sequence.tokens.ids(known))

    def _next_chunk(self, tenant: _Tenant, planned: Planned) -> tuple[Lane, int] | None:
        """Return what comes next of the tenant's first sequence with prefill left, and its rows."""
        for sequence in tenant.running:
            begin = planned.get(Lane(sequence), sequence.next_position())
            left = begin < len(sequence.tokens) and sequence.to_edge(begin)
            if left and (Lane(sequence) in planned or sequence.prefills()):
                return self._piece(sequence, planned)
        return None

    def _piece(self, sequence: Sequence, planned: Planned) -> tuple[Lane, int] | None:
        """Return a lane and its rows to the next edge.

        The last row waits for the gate, and for the shadow to be as far.
        """
        last = len(sequence.tokens) - 1
        own, shadow = Lane(sequence), Lane(sequence, shadow=True)
        begin = {lane: planned.get(lane, lane.position) for lane in (own, shadow)}
        behind = begin[shadow] < last
        for lane, waits in ((own, behind or self._held_back(sequence)), (shadow, True)):
            left = last + (not waits) - begin[lane]
            if left > 0:
                chunk = self._limits.chunk_tokens
                rows = min(left, chunk - begin[lane] % chunk)
                return lane, rows if lane.shadow else min(rows, sequence.to_edge(begin[lane]))
        return None

    def _held_back(self, sequence: Sequence) -> bool:
        """Tell whether a sequence must leave its last row: all that it can be timed by."""
        if self._gate is None or sequence.opens_s is None or sequence.generated:
            return False
        return not self._gate.is_open(sequence.opens_s)

    def _take_chunk(self, tenant: _Tenant, planned: Planned) -> None:
        found = self._next_chunk(tenant, planned)
        assert found is not None
        lane, rows = found
        planned[lane] = planned.get(lane, lane.position) + rows


def _cost(chunk: tuple[Lane, int] | None) -> int | None:
    return None if chunk is None else chunk[1]
