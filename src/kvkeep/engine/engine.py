"""The engine's core, without threads or processes: submit, cancel, step."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import torch

from kvkeep.cache.caches import Caches
from kvkeep.engine import messages as m
from kvkeep.engine.admission import check_request
from kvkeep.engine.anew import begin_anew, running
from kvkeep.engine.apart import NO_ROOM, Elsewhere, NothingElsewhere
from kvkeep.engine.api import (
    Chunk,
    EngineStats,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Purged,
    TenantTerms,
)
from kvkeep.engine.branches import Beams, held_of
from kvkeep.engine.divergence import compare
from kvkeep.engine.family import family_of, lost_parts, unstored
from kvkeep.engine.forms import Forms
from kvkeep.engine.handing import awaits, begin, hands_over
from kvkeep.engine.held import GOOD, BestOf
from kvkeep.engine.limits import SchedulerLimits
from kvkeep.engine.moments import Moments
from kvkeep.engine.output import OutputFactory
from kvkeep.engine.probes import probe_beside, probe_id
from kvkeep.engine.prompt_rows import take_prompt_rows
from kvkeep.engine.report import Sources, snapshot
from kvkeep.engine.runner import ModelRunner, Stepped
from kvkeep.engine.sampling import Sampler, TokenScores
from kvkeep.engine.scheduler import Scheduler
from kvkeep.engine.sequence import Request, Sequence, Status, TokenBuffer, stored_as
from kvkeep.engine.sharing import EpochTimer, Sharing
from kvkeep.engine.stats import EngineCounters
from kvkeep.engine.work import Work
from kvkeep.errors import EngineError, InvalidRequest
from kvkeep.types import EpochDelta
from kvkeep.watch import Watch


class Output(NamedTuple):
    """Something for the front end."""

    request_id: str
    chunk: Chunk


class EngineCore:
    """Joins scheduler, cache, runner and sampler; `step` is schedule, run, emit."""

    def __init__(
        self,
        info: ModelInfo,
        caches: Caches,
        runner: ModelRunner,
        outputs: OutputFactory,
        limits: SchedulerLimits,
        sharing: Sharing,
        forms: Forms,
        *,
        prefix_caching: bool = True,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.sharing = sharing
        self.epochs = EpochTimer(sharing.epoch_s, led=sharing.led)
        self._prefix_caching = prefix_caching
        self._elsewhere = elsewhere or NothingElsewhere()
        self.info = info
        self.caches = caches
        self.forms = forms
        self._runner = runner
        self._outputs = outputs
        self._limits = limits
        self._sampler = Sampler(info.vocab_size, runner.kernels.sample)
        self._scheduler = Scheduler(
            caches, limits, self._exhaust, runner, forms.settle, sharing.reads, sharing.gate
        )
        self._requests: dict[str, Request] = {}
        self._shares: dict[str, float] = {}
        self._pending: list[Output] = []
        self.kernels = runner.kernels
        self.num_heads = runner.num_heads
        self.weight_bytes = runner.weight_bytes
        """Bytes of packed weights read to compute one row."""
        self.stalled = False
        """Whether the last step found nothing it could run."""
        self.counters = EngineCounters()
        self._of_probes = EngineCounters()

    def set_tenants(
        self, shares: Mapping[str, float], terms: Mapping[str, TenantTerms] | None = None
    ) -> None:
        """Reserve each tenant's share of the pool; tenants left out lose their requests."""
        self._limits.caps(shares)
        for request in list(self._requests.values()):
            if request.spec.tenant not in shares:
                self._end_request(request, FinishReason.CANCELLED)
        self.caches.set_shares(shares)
        for name in self._shares.keys() - shares.keys():
            self.caches.forget(name)
            self.forms.guard.forget(name)
        for name in self.sharing.leaving(terms or {}):
            self.caches.forget_votes(name)
        self.sharing.settle(terms or {})
        self.caches.set_retention(self.sharing.retention())
        self._shares = dict(shares)
        self._scheduler.set_tenants(shares)

    def submit(self, spec: GenerateRequest) -> None:
        """Queue a request; one that can never run ends at once with an error chunk."""
        part = self._elsewhere.part_of(spec)
        apart = 0 if part is None else part.pages
        try:
            codec = self.forms.least(spec)
            check_request(spec, self.info, self._shares, self.caches, codec, apart=apart)
        except InvalidRequest as error:
            self._emit(spec.id, Chunk(finish=FinishReason.ERROR, error=str(error)))
            return
        if not self._prefix_caching:
            spec = msgspec.structs.replace(spec, scope=f"{spec.scope}/{spec.id}")
        if self.sharing.stores_nothing(spec.tenant):
            spec = msgspec.structs.replace(spec, store=False)
        now = time.monotonic()
        deadline = None if spec.deadline_s is None else now + spec.deadline_s
        rows = self._elsewhere.rows_of(spec)
        request = Request(spec, now, deadline, awaits=awaits(spec), part=part, rows=rows)
        request.watch = self.watch(spec)
        request.epoch, request.sample = self.forms.enter(spec, evicts=request.watch is not None)
        self._queue(request)
        if (probe := probe_beside(request, self.forms.guard, self.info.max_model_len)) is not None:
            self._queue(probe)

    def watch(self, spec: GenerateRequest) -> Watch | None:
        """Return when a request's rows are observed and its tokens evicted; None: never."""
        return self._runner.watch(spec) if self.sharing.may_evict(spec) else None

    def _queue(self, request: Request) -> None:
        spec = request.spec
        seed = spec.params.seed if spec.params.seed is not None else secrets.randbits(63)
        request.sequences.append(self._sequence(request, 0, seed))
        request.held = held_of(request, self._outputs, self.info.max_model_len)
        self._requests[spec.id] = request
        self._counters_of(request).prompt_tokens += len(spec.prompt_ids)
        self._scheduler.add(request.sequences[0])

    def cancel(self, request_id: str) -> None:
        """End a request without another word to its client; unknown ids are ignored."""
        for name in (request_id, probe_id(request_id)):
            if (request := self._requests.get(name)) is not None:
                self._end_request(request, FinishReason.CANCELLED)

    def begin(self, handed: m.Begin) -> None:
        """Let a request go on after another engine's tokens; one that has ended is left alone."""
        if (request := self._requests.get(handed.request_id)) is not None:
            begin(request, handed, self._counters_of(request), self._end_request)

    def moments(self, request_id: str) -> Moments | None:
        """Return where to note what happens to a request; None for one that has ended."""
        request = self._requests.get(request_id)
        return None if request is None else request.moments

    def purge(self, tenant: str) -> Purged:
        """Drop a tenant's cached pages and votes; what runs leaves nothing behind."""
        gone = self.caches.forget(tenant)
        return Purged(pages=gone.pages, votes=gone.votes)

    def close(self) -> None:
        """End what runs beside the loop, once what nothing uses was written below memory."""
        self.sharing.close()
        self.caches.close()

    def end_epoch(self, now: float) -> EpochDelta:
        """Close the sharing policy's epoch at `now` (seconds) and apply what it makes public."""
        self.sharing.end_epoch(now)
        return self.caches.end_epoch(now)

    def reset_counters(self) -> None:
        """Start counting afresh, after warm-up."""
        self.counters = EngineCounters()

    def idle(self) -> bool:
        """Return whether nothing is queued or running."""
        return not self._requests and not self._pending

    def step(self) -> list[Output]:
        """Advance every scheduled sequence by one step and return what is new."""
        begun = time.perf_counter()
        self._expire(time.monotonic())
        work = self._scheduler.schedule()
        self.stalled = not work
        if work:
            stepped = self._runner.step(work)
            self._after(work, stepped)
            elapsed = time.perf_counter() - begun
            self.counters.steps += 1
            self.counters.step_seconds += elapsed
            self.counters.model_seconds += stepped.model_s
            self.counters.step.add(elapsed)
        out, self._pending = self._pending, []
        return out

    def stats(self) -> EngineStats:
        """Return a snapshot for the admin port."""
        most = self.info.max_model_len
        sources = Sources(
            self.caches, self._scheduler, self._runner, self.sharing, self.forms.guard, most
        )
        return snapshot(sources, self.counters, self._shares)

    def _sequence(self, request: Request, index: int, seed: int) -> Sequence:
        spec, outputs = request.spec, self._outputs
        tokens = TokenBuffer.of(spec)
        sampling = outputs.sampling(spec, index, seed)
        return Sequence(request, index, tokens, sampling, outputs.sequence(spec, index))

    def _after(self, work: list[Work], stepped: Stepped) -> None:
        """Index what closed, take in prompt log-probabilities, sample and emit."""
        begin_anew(work, stepped, self._runner, self.caches, self._scheduler)
        own = [item for item in work if not item.shadow]
        lost = lost_parts(own, stepped)
        for item in running(own):
            view, tokens = item.view, item.sequence.tokens
            if item.commits:
                self.caches.of_view(view).commit(view, tokens.ids(view.length))
                item.sequence.uncommitted = False
            self._scheduler.packs.pack(item.sequence)
        now = time.monotonic()
        for sequence, error in unstored(own, stepped):
            self._fail(sequence, str(error), now)
        compare(work, stepped)
        take_prompt_rows(own, stepped, self._sampler)
        sampling = [item.sequence for item in own if item.samples]
        rows: list[int] = []
        sequences: list[Sequence] = []
        searches: dict[Request, Beams] = {}
        for row, sequence in enumerate(sampling, stepped.prompt_rows):
            if sequence.status is not Status.RUNNING or sequence in lost:
                continue
            held = sequence.request.held
            if isinstance(held, Beams):
                self._take_beam(held, sequence, stepped.logits[row], now)
                searches[sequence.request] = held
                continue
            family = family_of(sequence, self._sequence, self._scheduler.follow)
            rows += [row] * len(family)
            sequences += family
        for request, beams in searches.items():
            if request.spec.id in self._requests:
                self._advance(request, beams, now)
        if sequences:
            self._sample(stepped.logits, rows, sequences, now)
        for sequence in lost:
            self._scheduler.restart(sequence)

    def _sample(
        self, logits: torch.Tensor, rows: list[int], sequences: list[Sequence], now: float
    ) -> None:
        """Choose each sequence's next token from its row of logits [R, V]."""
        logits = logits if rows == list(range(len(logits))) else logits[rows]
        sampled = self._sampler.sample(logits, [s.sampling for s in sequences])
        for sequence, token, scores, error in zip(sequences, *sampled, strict=True):
            if sequence.status is Status.FINISHED:
                continue
            if error is not None:
                self._fail(sequence, str(error), now)
            else:
                self._accept(sequence, token, scores, now)

    def _take_beam(
        self, beams: Beams, sequence: Sequence, logits: torch.Tensor, now: float
    ) -> None:
        """Note what may follow one beam; a row that is not finite ends the search."""
        if sequence.status is Status.FINISHED:
            return
        try:
            beams.take(sequence, logits, self._sampler)
        except EngineError as error:
            self._fail(sequence, str(error), now)

    def _advance(self, request: Request, beams: Beams, now: float) -> None:
        """Let a request's beams grow, and end it where its search has."""
        self._first_token(request, now)
        self.counters.generated_tokens += beams.advance(self._scheduler, self._sequence)
        if not beams.search.beams:
            self._end_request(request, FinishReason.STOP)

    def _first_token(self, request: Request, now: float) -> None:
        """Count a request's first token, once."""
        if request.first_token_s is None:
            request.first_token_s = now
            self._counters_of(request).begin(request, now)

    def _counters_of(self, request: Request) -> EngineCounters:
        """Return where a request counts: a guard's own ones are not their tenant's."""
        return self._of_probes if request.is_probe else self.counters

    def _accept(
        self, sequence: Sequence, token: int, scores: TokenScores | None, now: float
    ) -> None:
        """Append a sampled token, emit its text and end the sequence where it must."""
        request, params = sequence.request, sequence.request.spec.params
        cached = request.cached_tokens or 0
        self._first_token(request, now)
        if isinstance(request.held, BestOf) and scores is not None:
            request.held.note(sequence.index, scores.logprob)
        if params.logprobs is None:
            scores = None
        if params.max_tokens == 0:
            chunk: Chunk | None = sequence.output.finish(FinishReason.LENGTH, cached)
        else:
            token = token if sequence.planted is None else sequence.planted
            sequence.tokens.append(token)
            sequence.sampling.accept(token)
            sequence.generated += 1
            self._counters_of(request).generated_tokens += 1
            full = len(sequence.tokens) >= self.info.max_model_len
            last = full or sequence.generated >= params.max_tokens
            chunk = sequence.output.push(token, scores, cached, last=last)
            if hands_over(request) and (chunk is None or chunk.finish is None):
                chunk = sequence.output.hand_over(chunk, cached)
        if chunk is not None:
            self._tell(request, chunk)
            if chunk.finish is not None:
                self._end(sequence, chunk.finish, now)

    def _fail(self, sequence: Sequence, message: str, now: float, *, again: bool = False) -> None:
        chunk = Chunk(
            index=sequence.index,
            finish=FinishReason.ERROR,
            error=message,
            again=again,
            cached_tokens=sequence.request.cached_tokens or 0,
        )
        self._tell(sequence.request, chunk)
        if sequence.request.held is None:
            self._end(sequence, FinishReason.ERROR, now)
        else:
            self._end_request(sequence.request, FinishReason.ERROR)

    def _exhaust(self, sequence: Sequence) -> None:
        """End a sequence that its tenant's share can't hold even alone, and so no other beam."""
        request = sequence.request
        if request.part is not None and request.part.state == "lost":
            self._fail(sequence, NO_ROOM, time.monotonic(), again=True)
            return
        if isinstance(request.held, Beams):
            self._end_request(request, FinishReason.LENGTH)
            return
        self._tell(request, sequence.output.finish(FinishReason.LENGTH, request.cached_tokens or 0))
        self._end(sequence, FinishReason.LENGTH, time.monotonic())

    def _end(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        request = sequence.request
        counters = self._counters_of(request)
        self._scheduler.remove(sequence)
        counters.finished[reason] += 1
        if sequence.generated > 1 and request.first_token_s is not None:
            counters.tpot.add((now - request.first_token_s) / (sequence.generated - 1))
        if all(s.status is Status.FINISHED for s in request.sequences):
            counters.e2e.add(now - request.arrived_s)
            self.forms.guard.settle(request.sample, counts=reason in GOOD)
            self._requests.pop(request.spec.id, None)
            for chunk in () if request.held is None else request.held.result():
                self._emit(request.spec.id, stored_as(chunk, request))
            request.sequences = []  # they hold the request: its tokens go now, not when cycles do

    def _end_request(self, request: Request, reason: FinishReason) -> None:
        now = time.monotonic()
        for sequence in request.sequences:
            if sequence.status is not Status.FINISHED:
                cached = request.cached_tokens or 0
                self._tell(request, sequence.output.finish(reason, cached))
                self._end(sequence, reason, now)

    def _expire(self, now: float) -> None:
        for request in list(self._requests.values()):
            if request.deadline_s is not None and now >= request.deadline_s:
                self._end_request(request, FinishReason.DEADLINE)

    def _tell(self, request: Request, chunk: Chunk) -> None:
        """Send a chunk, or keep it where the request's best are told at its end."""
        if request.planted:
            return
        if request.held is None:
            self._emit(request.spec.id, stored_as(chunk, request))
        else:
            request.held.add(chunk)

    def _emit(self, request_id: str, chunk: Chunk) -> None:
        self._pending.append(Output(request_id, chunk))
