"""The guard of an engine that is led: it runs the shadows it is told to and says what they said.

Who carries one, and what comes of it, is decided where a cluster's workers are led, since
a tenant's requests are answered by several. So nothing of a tenant is remembered here.
"""

from __future__ import annotations

from kvkeep.engine import messages as m
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.guard import Sample, Ticket
from kvkeep.engine.guarded import GuardUse, Said


class LedGuard:
    """Samples of requests under way, by the request that each was asked for with."""

    def __init__(self, form: str) -> None:
        """`form` stores shadows."""
        self.form = form
        self._open: dict[str, list[Sample]] = {}
        """By request: its own and that of a probe beside it."""
        self._requests: dict[Sample, str] = {}
        self._ready: list[m.Verdict] = []

    def enter(
        self, spec: GenerateRequest, reserved_tokens: int, limit: int, *, can: bool
    ) -> Ticket:
        """Return the sample of a request that is to carry a shadow.

        Of one that can't, whoever asked is told that it says nothing.
        """
        told = spec.guarded
        if told is None or not told.sampled:
            return Ticket(0, None)
        if not can:
            self._ready.append(m.Verdict(spec.id))
            return Ticket(0, None)
        sample = Sample(spec.tenant, told.number, self.form, reserved_tokens, limit)
        self._open[spec.id] = [sample]
        self._requests[sample] = spec.id
        return Ticket(0, sample)

    def plant(self, ticket: Ticket, reserved_tokens: int, limit: int) -> Sample | None:
        """Return the sample of a probe beside a sampled request."""
        beside = ticket.sample
        if beside is None:
            return None
        sample = Sample(beside.tenant, beside.number, self.form, reserved_tokens, limit, probe=True)
        request_id = self._requests[sample] = self._requests[beside]
        self._open[request_id].append(sample)
        return sample

    def floor(self, spec: GenerateRequest) -> int:
        """Return the steps back that a request takes: those it came with."""
        return 0 if spec.guarded is None else spec.guarded.steps_back

    def settle(self, sample: Sample | None, *, counts: bool) -> None:
        """Hear that a sampled request has ended; `counts`: by itself, not by its client or time."""
        if sample is None or sample.settled:
            return
        sample.over = sample.settled = True
        if not counts:
            sample.void()
        request_id = self._requests.pop(sample)
        samples = self._open[request_id]
        if all(one.settled for one in samples):
            del self._open[request_id]
            self._ready.append(m.Verdict(request_id, tuple(_said(one) for one in samples)))

    def forget(self, tenant: str) -> None:
        """Nothing is remembered of a tenant: its requests were ended, and what they say is told."""

    def stats(self) -> tuple[GuardUse, ...]:
        """Return nothing: whoever leads counts."""
        return ()

    def take(self) -> list[m.Verdict]:
        """Return what is to be told by now."""
        told, self._ready = self._ready, []
        return told


def _said(sample: Sample) -> Said:
    return Said(
        compared=sample.compared,
        agreed=sample.agreed,
        recalled=sample.recalled,
        forgotten=sample.forgotten,
        kl_nats=sample.kl_nats,
        probe=sample.probe,
    )
