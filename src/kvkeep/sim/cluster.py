"""A cluster in simulated time: placement, prefill, transfer, decode, and where the time goes.

Simulated rows never stand beside measured ones: whoever prints them says what they are.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import numpy as np
import simpy

from kvkeep.engine.speeds import GIGABIT_BYTES, Speeds
from kvkeep.errors import ConfigError
from kvkeep.sim.costs import Costs
from kvkeep.sim.load import Drawn
from kvkeep.sim.workers import Size, Steps, Worker
from kvkeep.types import PAGE_TOKENS

Placement = Literal["affine", "least_queued"]
PHASES: Final = ("queue", "prefill", "quantise", "transfer", "install", "decode", "other")


@dataclass(frozen=True, slots=True)
class Link:
    """What leaves a prefill worker."""

    gigabits_per_s: float = 10.0
    latency_s: float = 0.0002
    streamed: bool = True
    """Layers leave while later ones are computed; else all leave at the end."""
    token_s: float | None = None
    """Rows behind whole blocks are computed again where that is sooner, at so much a token; None:
    they are sent.
    """

    @property
    def bytes_per_s(self) -> float:
        """Return its bandwidth."""
        return self.gigabits_per_s * GIGABIT_BYTES

    def rows_pay(self, prompt: int, rows: int, pages_bytes: float, rows_bytes: float) -> bool:
        """Tell whether such rows are sent."""
        if self.token_s is None:
            return True
        speeds = Speeds(link_bytes_per_s=self.bytes_per_s, token_s=self.token_s)
        return speeds.rows_pay(prompt, rows, pages_bytes, rows_bytes)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers and what joins them. Without decode workers each does both: colocated."""

    codec: str
    prefill_workers: int = 1
    decode_workers: int = 1
    link: Link = field(default_factory=Link)
    prefill_size: Size = field(default_factory=Size)
    decode_size: Size = field(default_factory=Size)
    placement: Placement = "affine"
    layers: int = 28
    least_tokens: int = 0
    """Shorter prompts are computed where they are answered."""
    cache_tokens: int = 0
    """Of prefixes that a prefill worker keeps; the least recently used one goes first."""

    def __post_init__(self) -> None:
        if self.prefill_workers < 1 or self.decode_workers < 0:
            raise ConfigError("prefill_workers must be 1 or more and decode_workers 0 or more")
        if self.link.gigabits_per_s <= 0:
            raise ConfigError("link: gigabits_per_s must be above 0")


@dataclass(frozen=True, slots=True)
class Tenants:
    """Who asks, and what their prompts begin with."""

    count: int = 1
    templates: int = 0
    template_tokens: int = 0
    public_templates: int = 0
    """The most popular of them, that all tenants share; each worker fetches each once."""
    seed: int = 0


class Served(NamedTuple):
    """A request's times in seconds."""

    at_s: float
    ttft_s: float
    jct_s: float
    phases: tuple[float, ...]
    """In the order of `PHASES`."""
    found_tokens: int
    sent_bytes: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load met with."""

    served: tuple[Served, ...]
    lasted_s: float
    prompt_tokens: int
    busiest_link: float
    """Its share of the time in which it sent."""
    busiest_worker: float
    snapshot_bytes: float
    """Of public prefixes that workers fetched."""

    def jct(self, percent: float | None = None) -> float:
        """Return a percentile of the completion times, or their mean."""
        times = [one.jct_s for one in self.served]
        return float(np.mean(times) if percent is None else np.percentile(times, percent))

    def ttft(self, percent: float) -> float:
        """Return a percentile of the times to the first token."""
        return float(np.percentile([one.ttft_s for one in self.served], percent))

    def phase_shares(self) -> dict[str, float]:
        """Return the share of each phase in all completion times."""
        sums = np.sum([one.phases for one in self.served], axis=0)
        whole = sum(one.jct_s for one in self.served)
        return dict(zip(PHASES, (sums / whole).tolist(), strict=True))

    @property
    def hit_ratio(self) -> float:
        """Return the share of prompt tokens that were found."""
        return sum(one.found_tokens for one in self.served) / self.prompt_tokens


class Wire:
    """One worker's link: transfers one after another, each as fast as its bytes come to be."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._rate = link.bytes_per_s
        self._free_s = 0.0
        self.busy_s = 0.0

    def send(self, begun_s: float, ended_s: float, sent: float, last: float) -> float:
        """Return when bytes that were made between two times have arrived.

        `last`: how many of them come to be at the very end.
        """
        took_s = sent / self._rate
        if self._link.streamed:
            done = max(max(begun_s, self._free_s) + took_s, ended_s + last / self._rate)
        else:
            done = max(ended_s, self._free_s) + took_s
        self.busy_s += took_s
        self._free_s = done
        return done + self._link.latency_s


class Prefixes:
    """What one worker keeps of its tenants' prefixes, the least recently used going first."""

    def __init__(self, room_tokens: int) -> None:
        self._limit = self._room = room_tokens
        self._kept: OrderedDict[tuple[int, int], int] = OrderedDict()

    def found(self, name: tuple[int, int], tokens: int) -> int:
        """Return the tokens found of a prefix, and keep the longer of what was and is there."""
        held = self._kept.get(name, 0)
        longer = max(held, tokens)
        if longer > self._limit:
            return held
        self._room += self._kept.pop(name, 0)
        while self._kept and self._room < longer:
            self._room += self._kept.popitem(last=False)[1]
        self._kept[name] = longer
        self._room -= longer
        return held


class Simulation:
    """One load on one cluster."""

    def __init__(self, cluster: Cluster, costs: Costs, tenants: Tenants) -> None:
        if cluster.codec not in costs.codecs:
            known = ", ".join(costs.codecs)
            raise ConfigError(f"codec: {cluster.codec!r} was not measured; there are {known}")
        self._cluster, self._costs, self._tenants = cluster, costs, tenants
        self._env = simpy.Environment()
        self._prefill = self._workers(cluster.prefill_workers, cluster.prefill_size)
        self._decode = self._workers(cluster.decode_workers, cluster.decode_size)
        self._wires = [Wire(cluster.link) for _ in self._prefill]
        self._caches = [Prefixes(cluster.cache_tokens) for _ in self._prefill]
        self._fetched: set[tuple[int, int]] = set()
        self._snapshot_bytes = 0.0
        self._served: list[Served] = []

    def run(self, drawn: Drawn) -> Outcome:
        """Play all requests to their ends."""
        self._env.process(self._arrive(drawn))
        self._env.run()
        lasted = max(one.at_s + one.jct_s for one in self._served)
        return Outcome(
            served=tuple(self._served),
            lasted_s=lasted,
            prompt_tokens=int(drawn.prompt_tokens.sum()),
            busiest_link=max(wire.busy_s for wire in self._wires) / lasted,
            busiest_worker=max(w.busy_s for w in (*self._prefill, *self._decode)) / lasted,
            snapshot_bytes=self._snapshot_bytes,
        )

    def _workers(self, count: int, size: Size) -> list[Worker]:
        codec = self._cluster.codec
        workers = [Worker(self._env, self._costs, codec, size) for _ in range(count)]
        for worker in workers:
            worker.start()
        return workers

    def _arrive(self, drawn: Drawn) -> Steps:
        asked = self._askers(len(drawn.at_s))
        for at_s, prompt, answer, (tenant, template) in zip(*drawn, asked, strict=True):
            yield self._env.timeout(max(0.0, float(at_s) - self._env.now))
            self._env.process(self._serve(int(prompt), int(answer), tenant, template))

    def _askers(self, requests: int) -> list[tuple[int, int]]:
        """Return each request's tenant and template, by Zipf(1) over templates; -1 is none."""
        chance = np.random.default_rng(self._tenants.seed)
        tenants = chance.integers(self._tenants.count, size=requests).tolist()
        if not self._tenants.templates:
            return [(tenant, -1) for tenant in tenants]
        weights = 1 / np.arange(1, self._tenants.templates + 1)
        chosen = chance.choice(self._tenants.templates, requests, p=weights / weights.sum())
        return list(zip(tenants, chosen.tolist(), strict=True))

    def _serve(self, prompt: int, answer: int, tenant: int, template: int) -> Steps:
        """Take one request from its arrival to its last token."""
        env, begun = self._env, self._env.now
        at = self._place(tenant, template)
        target = self._target(tenant, template) if self._decode else self._prefill[at]
        again = self._again(prompt)
        stays = bool(self._decode) and (prompt < self._cluster.least_tokens or again == prompt)
        found = 0 if stays else self._found(at, tenant, template, prompt)
        job = (target if stays else self._prefill[at]).compute(prompt - found, found)
        yield job.computed
        first = arrived = installed = started = env.now
        sent = 0.0
        splits = bool(self._decode) and not stays and answer > 1
        if splits:
            sent = self._sent_bytes(prompt, found, again)
            arrived = self._arrival_s(at, job.begun_s, first, sent, prompt - found)
            yield env.timeout(arrived - first)
            widen_s = self._costs.codecs[self._cluster.codec].decode_s_per_token * prompt
            yield env.timeout(self._costs.handover_s + widen_s)
            installed = env.now
        rest = target.compute(again, prompt - again) if splits and again else None
        if rest is not None:
            yield rest.computed
        if answer > 1:
            row = target.decode(answer - 1, prompt + 1)
            yield row.ended
            started = row.begun_s if rest is None else rest.begun_s
        phases = (
            job.begun_s - begun,
            first - job.begun_s - job.encode_s,
            job.encode_s,
            arrived - first,
            installed - arrived,
            env.now - started,
            started - installed,
        )
        self._served.append(Served(begun, first - begun, env.now - begun, phases, found, sent))

    def _again(self, prompt: int) -> int:
        """Return a prompt's last tokens that are computed where it is answered."""
        rest = prompt % (self._costs.codecs[self._cluster.codec].block_tokens or 1)
        rows = rest * self._costs.bytes_per_token
        pages = self._costs.sent_bytes(self._cluster.codec, prompt) - rows
        return 0 if self._cluster.link.rows_pay(prompt, rest, pages, rows) else rest

    def _sent_bytes(self, prompt: int, found: int, again: int) -> float:
        """Return what goes over the link: not what the other side holds, or computes again."""
        whole = self._costs.sent_bytes(self._cluster.codec, prompt)
        whole -= again * self._costs.bytes_per_token
        held = min(found, prompt - again) if self._cluster.placement == "affine" else 0
        return whole - held * self._costs.codecs[self._cluster.codec].bytes_per_token

    def _arrival_s(self, at: int, begun: float, ended: float, sent: float, tokens: int) -> float:
        """Return when a prompt's bytes are there, the last chunk's last layer's at the end."""
        chunks = -(-tokens // self._cluster.prefill_size.chunk_tokens)
        return self._wires[at].send(begun, ended, sent, sent / (chunks * self._cluster.layers))

    def _place(self, tenant: int, template: int) -> int:
        if self._cluster.placement == "affine":
            return _hashed(b"prefill", tenant, template) % len(self._prefill)
        queued = [worker.queued_tokens for worker in self._prefill]
        return queued.index(min(queued))

    def _target(self, tenant: int, template: int) -> Worker:
        if self._cluster.placement == "affine":
            return self._decode[_hashed(b"decode", tenant, template) % len(self._decode)]
        return min(self._decode, key=lambda worker: worker.rows)

    def _found(self, at: int, tenant: int, template: int, prompt: int) -> int:
        """Return the tokens of a prompt that its worker holds; one is always computed."""
        if template < 0:
            return 0
        tokens = min(self._tenants.template_tokens, prompt - 1) // PAGE_TOKENS * PAGE_TOKENS
        if template >= self._tenants.public_templates:
            return min(tokens, self._caches[at].found((tenant, template), tokens))
        if (at, template) not in self._fetched:
            self._fetched.add((at, template))
            codec = self._costs.codecs[self._cluster.codec]
            self._snapshot_bytes += self._tenants.template_tokens * codec.bytes_per_token
        return tokens


def _hashed(kind: bytes, tenant: int, template: int) -> int:
    """Return a number that spreads tenants and what their prompts begin with."""
    name = kind + tenant.to_bytes(8, "little") + template.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
