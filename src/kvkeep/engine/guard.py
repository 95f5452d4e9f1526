"""The guard of a tenant's answers: some requests carry a shadow, and what it says has effect.

A shadow is the same request on pages in the model's dtype by the null objects: no codec, no
evictor. It is fed the request's tokens and never sampled from; how far the two next-token
distributions are apart is the request's sample. Where tokens are evicted, a probe runs beside a
sampled request: the same prompt, and then a passage of it again, which the whole cache could tell.

Everything here is a function of a tenant's own requests, in the order they were submitted, and of
the configuration. An epoch of a tenant ends when so many of its requests have been sampled. What
epoch e says is known once all its samples have ended and has effect from epoch e + 2 on; a
request of that epoch waits for them. So neither load nor who finished first can enter.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from kvkeep.engine.guarded import GuardUse, Said
from kvkeep.engine.options import EngineOptions
from kvkeep.sharing.state import FileStore, NoStore, StateStore

LAG: Final = 2
"""Epochs from the one that was sampled to the one that follows from it."""

MOST_FORGOTTEN: Final = 0.2
"""Of an epoch's planted tokens that shadows told, those that may be told without no more."""

LEAST_RECALLED: Final = 16
"""Planted tokens that shadows must have told before that counts."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Sample:
    """One request's shadow and what it has said so far."""

    tenant: str
    number: int
    """Of the tenant's requests."""
    form: str
    """What stores the shadow's pages."""
    reserved_tokens: int
    """Of prompt and answer."""
    limit: int
    """Rows that are compared at most."""
    rows: int = 0
    """That its shadow has had to compare, whatever came of it: these fill what was reserved."""
    compared: int = 0
    agreed: int = 0
    """Of the rows, those whose most likely token is the same."""
    kl_nats: float = 0.0
    """Summed over the rows."""
    recalled: int = 0
    """Planted tokens that the shadow told as the most likely ones."""
    forgotten: int = 0
    """Of these, those that the request did not."""
    probe: bool = False
    """Whether its request is one of the guard's own."""
    over: bool = False
    """Whether it carries no shadow any more."""
    settled: bool = False

    @property
    def wanted(self) -> bool:
        """Tell whether the request is to carry a shadow."""
        return not self.over and self.rows < self.limit

    def add(self, kl_nats: float, *, agrees: bool) -> None:
        """Take in one row."""
        self.skip()
        self.compared += 1
        self.agreed += agrees
        self.kl_nats += kl_nats

    def recall(self, *, served: bool) -> None:
        """Take in a planted token that the shadow told; `served`: the request did too."""
        self.recalled += 1
        self.forgotten += not served

    def skip(self) -> None:
        """Count a row that says nothing: it took its place in what was reserved."""
        self.rows += 1

    def take(self, said: Said) -> None:
        """Take in all that was said elsewhere."""
        self.compared, self.agreed = said.compared, said.agreed
        self.recalled, self.forgotten = said.recalled, said.forgotten
        self.kl_nats = said.kl_nats

    def void(self) -> None:
        """Drop what was said: how much was depends on when its request was ended."""
        self.compared = self.agreed = self.recalled = self.forgotten = 0
        self.kl_nats = 0.0


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """When requests are sampled and when a tenant steps back."""

    share: float
    """Of the requests that could drift."""
    samples: int
    """That end an epoch."""
    kl_nats: float
    """Mean over an epoch's rows above which the tenant steps back."""


class Ticket(NamedTuple):
    """A request's place in its tenant's history."""

    epoch: int
    sample: Sample | None


@dataclass(slots=True)
class _History:
    """One tenant's; `floors` of the last epochs that are known."""

    floors: dict[int, int]
    known: int = LAG - 1
    sent: int = 0
    epoch: int = 0
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    """By epoch, until judged."""
    shadowed: int = 0
    unshadowed: int = 0
    compared: int = 0
    agreed: int = 0
    recalled: int = 0
    forgotten: int = 0
    kl_nats: float = 0.0

    def count(self, sample: Sample | None) -> None:
        """Count a drawn request; None: it could not carry a shadow. Of a probe its tokens alone."""
        if sample is None or not sample.compared:
            self.unshadowed += sample is None or not sample.probe
            return
        self.shadowed += not sample.probe
        self.compared += sample.compared
        self.agreed += sample.agreed
        self.recalled += sample.recalled
        self.forgotten += sample.forgotten
        self.kl_nats += sample.kl_nats


class Guard:
    """Samples requests, judges epochs and says how far each tenant has stepped back."""

    def __init__(self, limits: GuardLimits, form: str, steps: int, store: StateStore) -> None:
        """`form` stores shadows; a tenant steps back `steps` times at most.

        `store` carries that over restarts.
        """
        self.form = form
        self.asleep = True
        """Until the engine has warmed up, nothing is sampled."""
        self._limits = limits
        self._steps = steps
        self._store = store
        self._back = _loaded(store, steps) if limits.share else {}
        self._tenants: dict[str, _History] = {}

    def enter(self, tenant: str, reserved_tokens: int, limit: int, *, can: bool) -> Ticket:
        """Count a request that could drift, and draw whether it carries a shadow.

        `can`: whether it could; its tenant's share may be too small for `reserved_tokens`.
        """
        if self.asleep or not self._limits.share:
            return Ticket(0, None)
        own = self._history(tenant)
        number, own.sent = own.sent, own.sent + 1
        epoch = own.epoch
        if draw(tenant, number) >= self._limits.share:
            return Ticket(epoch, None)
        if not can:
            own.count(None)
            return Ticket(epoch, None)
        sample = Sample(tenant, number, self.form, reserved_tokens, limit)
        ours = own.samples.setdefault(epoch, [])
        ours.append(sample)
        own.epoch += sum(not one.probe for one in ours) == self._limits.samples
        return Ticket(epoch, sample)

    def plant(self, ticket: Ticket, reserved_tokens: int, limit: int) -> Sample | None:
        """Return the sample of a probe beside a sampled request, of the same epoch."""
        beside = ticket.sample
        if beside is None:
            return None
        sample = Sample(beside.tenant, beside.number, self.form, reserved_tokens, limit, probe=True)
        self._history(beside.tenant).samples[ticket.epoch].append(sample)
        return sample

    def floor(self, tenant: str, epoch: int) -> int | None:
        """Return the steps back that requests of an epoch take; None: not known yet."""
        if not self._limits.share:
            return 0
        own = self._history(tenant)
        while own.known < epoch:
            judged = own.known + 1 - LAG
            samples = own.samples.get(judged, [])
            if not all(sample.settled for sample in samples):
                return None
            back = own.floors[own.known]
            if own.floors.pop(judged) == back and self._drifts(samples) and back < self._steps:
                back += 1
                self._step_back(tenant, back, samples)
            own.samples.pop(judged, None)
            own.known += 1
            own.floors[own.known] = back
        return own.floors.get(epoch, own.floors[own.known])

    def settle(self, sample: Sample | None, *, counts: bool) -> None:
        """Hear that a sampled request has ended; `counts`: by itself, not by its client or time."""
        if sample is None or sample.settled:
            return
        sample.over = sample.settled = True
        if not counts:
            sample.void()
        own = self._tenants.get(sample.tenant)
        if own is not None:
            own.count(sample)

    def hear(self, ticket: Ticket, said: tuple[Said, ...]) -> None:
        """Take in what a sample, and a probe beside it, have said in another engine.

        Nothing: it does not count.
        """
        sample = ticket.sample
        if sample is None or sample.settled:
            return
        own = self._tenants.get(sample.tenant)
        ours = [] if own is None else own.samples.get(ticket.epoch, [])
        for one in said if sample in ours else ():
            heard = self.plant(ticket, 0, 0) if one.probe else sample
            assert heard is not None
            heard.take(one)
            self.settle(heard, counts=True)
        self.settle(sample, counts=False)

    def forget(self, tenant: str) -> None:
        """Drop what is remembered of a tenant that left."""
        self._tenants.pop(tenant, None)
        if self._back.pop(tenant, None) is not None:
            self._save()

    def stats(self) -> tuple[GuardUse, ...]:
        """Return each tenant's figures, for the operator."""
        return tuple(
            GuardUse(
                tenant=name,
                shadowed=own.shadowed,
                unshadowed=own.unshadowed,
                compared_tokens=own.compared,
                agreed_tokens=own.agreed,
                recalled_tokens=own.recalled,
                forgotten_tokens=own.forgotten,
                kl_nats=own.kl_nats,
                steps_back=own.floors[own.known],
            )
            for name, own in sorted(self._tenants.items())
        )

    def _history(self, tenant: str) -> _History:
        found = self._tenants.get(tenant)
        if found is None:
            back = self._back.get(tenant, 0)
            found = self._tenants[tenant] = _History(dict.fromkeys(range(LAG), back))
        return found

    def _drifts(self, samples: list[Sample]) -> bool:
        rows = sum(sample.compared for sample in samples)
        recalled = sum(sample.recalled for sample in samples)
        forgotten = sum(sample.forgotten for sample in samples)
        if recalled >= LEAST_RECALLED and forgotten > MOST_FORGOTTEN * recalled:
            return True
        return sum(sample.kl_nats for sample in samples) > self._limits.kl_nats * rows

    def _step_back(self, tenant: str, back: int, samples: list[Sample]) -> None:
        rows = sum(sample.compared for sample in samples)
        log.warning(
            "guard: tenant %s steps back, step %d of %d: %.4f nats and %.3f of %d next tokens"
            " agree, %d of %d planted ones forgotten",
            tenant,
            back,
            self._steps,
            sum(sample.kl_nats for sample in samples) / rows,
            sum(sample.agreed for sample in samples) / rows,
            rows,
            sum(sample.forgotten for sample in samples),
            sum(sample.recalled for sample in samples),
        )
        self._back[tenant] = back
        self._save()

    def _save(self) -> None:
        try:
            self._store.save(msgspec.json.encode(self._back))
        except OSError as error:
            log.warning("guard: steps back could not be saved: %s", type(error).__name__)


def guard_of(options: EngineOptions, form: str, steps: int) -> Guard:
    """Return the guard that the options ask for, asleep."""
    limits = GuardLimits(options.guard_share, options.guard_samples, options.guard_kl)
    state = options.guard_state
    store = FileStore(Path(state), "guard_state") if state and options.guard_share else NoStore()
    return Guard(limits, form, steps, store)


def draw(tenant: str, number: int, what: bytes = b"") -> float:
    """Return a number in [0, 1) for one request of one tenant and what it is drawn for."""
    raw = f"{number} {tenant}".encode()
    drawn = hashlib.blake2b(raw, digest_size=8, salt=what, person=b"kvkeep-guard").digest()
    return int.from_bytes(drawn, "little") / 2**64


def _loaded(store: StateStore, steps: int) -> dict[str, int]:
    """Return what was saved, as far as this engine has steps; nothing of a file it cannot read."""
    raw = store.load()
    try:
        saved = {} if raw is None else msgspec.json.decode(raw, type=dict[str, int])
    except msgspec.MsgspecError:
        return {}
    return {tenant: min(max(back, 0), steps) for tenant, back in saved.items()}
