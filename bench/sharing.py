"""What sharing is worth and what it tells: every policy, on one committed trace.

Each policy gets a server of its own on the demo model, the same requests in the same order by the
same number of clients, and a pool of 30 % of what isolation would need. Requests of epochs 1 and 2
warm up. Then the leak audit runs against a fresh server of the same policy, once per seed, on the
channels that the index could leak by; its worst channel counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import httpx
import numpy as np

from bench import harness, sharing_trace
from bench.harness import Cell, Estimate, Figure, Goal, Options, Report, Row, estimate
from bench.load import TIMEOUT_S
from bench.sharing_attack import (
    AUDIT_PAGES,
    AUDITED,
    PRIVATE,
    attack_figures,
    attack_rows,
    attacked,
    certain,
)
from bench.sharing_trace import MEASURED_FROM, Ask, Shape, Texts
from kvkeep import metrics
from kvkeep.audit import Report as AuditReport
from kvkeep.cli.console import NOTES
from kvkeep.config import DEMO_MODEL
from kvkeep.errors import ConfigError
from kvkeep.metrics import Metric
from kvkeep.models.text import TextModel
from tests.servers import Server, serving

POOL_SHARE: Final = 0.3
CLIENTS: Final = 4
WINDOWS: Final = 12
"""Parts of the measured requests, for intervals of rates."""
SEEDS: Final = (1, 2, 3)
EPOCH_S: Final = 10.0
AUDIT_EPOCH_S: Final = 2.0
"""Short, since an audit waits for two epochs' ends again and again."""
QUICK_EPOCH_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Policy:
    """A value of `--share` and what it takes to measure it."""

    name: str
    flags: tuple[str, ...] = ()
    public: bool = True
    """Whether the pool beyond what every tenant needs for one request is left to public pages."""
    settles: bool = False
    """Whether what is sent becomes public at a later epoch's end."""

    def settle_s(self, epoch_s: float) -> float:
        """Return how long after it was sent something is public, if it ever is."""
        return 2 * epoch_s if self.settles else 0.0  # offers of e decide at the end of e + 1

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the server's command line."""
        return ("--share", self.name, *self.flags)


UNSAFE: Final = ("--unsafe-share-all",)
POLICIES: Final = (
    Policy("isolate", public=False),
    Policy("selective", settles=True),
    Policy("dp", settles=True),
    Policy("salt"),
    Policy("safekv", UNSAFE, settles=True),
    Policy("share_all", UNSAFE),
)
QUICK_POLICIES: Final = ("isolate", "selective", "share_all")
GROUP: Final = "bench"
"""All tenants are of it: a tenant without a group shares with nobody, whatever the policy."""


class Sample(NamedTuple):
    """One measured request."""

    ttft_s: float
    tokens: int
    ended_s: float


@dataclass(frozen=True, slots=True)
class Replay:
    """What one policy did with the trace's measured part."""

    samples: tuple[Sample, ...]
    """In the order of the trace."""
    begun_s: float
    hit_ratio: float
    scan_share: float
    """Of the server's processor time: the detector's."""

    def window_rates(self) -> list[float]:
        """Return tokens per second in parts of equal numbers of requests, by time of ending."""
        ordered = sorted(self.samples, key=lambda sample: sample.ended_s)
        since, rates = self.begun_s, []
        for part in np.array_split(np.arange(len(ordered)), WINDOWS):
            until = ordered[part[-1]].ended_s
            rates.append(sum(ordered[i].tokens for i in part) / (until - since))
            since = until
        return rates


def page_bytes() -> int:
    """Return the bytes of a page of the demo model."""
    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return int(sharing_trace.PAGE * heads * config["head_dim"] * 2 * 2)


def counter(server: Server, metric: Metric) -> float:
    """Return the sum of a counter on the admin port's metrics page."""
    page = server.admin("/metrics").text
    name = re.escape(f"{metric.full_name}_total")
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    if not found:
        raise RuntimeError(f"the metrics page has no {metric.full_name}_total")
    return sum(map(float, found))


class Counted(NamedTuple):
    """A server's counters at one moment."""

    found_tokens: float
    asked_tokens: float
    scan_s: float
    processor_s: float

    @classmethod
    def of(cls, server: Server) -> Counted:
        """Read them."""
        found, asked = (counter(server, m) for m in (metrics.PREFIX_HITS, metrics.PREFIX_QUERIES))
        return cls(found, asked, counter(server, metrics.SCAN_SECONDS), cpu_seconds(server))


class Player:
    """Plays a trace to one server."""

    def __init__(self, server: Server, texts: Texts, shape: Shape) -> None:
        self._server = server
        self._texts = texts
        self._shape = shape

    async def play(self, numbered: Sequence[tuple[int, Ask]]) -> list[Sample]:
        """Send requests in order, `CLIENTS` under way at a time."""
        left = iter(enumerate(numbered))
        samples: dict[int, Sample] = {}
        async with httpx.AsyncClient(base_url=self._server.url, timeout=TIMEOUT_S) as client:

            async def work() -> None:
                for place, (number, ask) in left:
                    samples[place] = await self._send(client, number, ask)

            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(work())
        return [samples[place] for place in range(len(numbered))]

    async def _send(self, client: httpx.AsyncClient, number: int, ask: Ask) -> Sample:
        prompt = self._texts.prompt(number, ask)
        body = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": self._shape.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {self._server.keys[tenant_name(ask.tenant)]}"}
        begun, first = time.perf_counter(), None
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            async for part in response.aiter_raw():
                if first is None and part.startswith(b"data: "):
                    first = time.perf_counter() - begun
        if first is None:
            raise RuntimeError("a stream ended without an event")
        return Sample(first, len(prompt) + self._shape.answer_tokens, time.perf_counter())


def tenant_name(number: int) -> str:
    """Return the name of a trace's tenant."""
    return f"tenant-{number}"


def replay(
    server: Server, trace: Sequence[Ask], texts: Texts, shape: Shape, settle_s: float
) -> Replay:
    """Play the whole trace; measure from `MEASURED_FROM` on."""
    player = Player(server, texts, shape)
    numbered = list(enumerate(trace))
    for epoch in range(1, MEASURED_FROM):
        asyncio.run(player.play([one for one in numbered if one[1].epoch == epoch]))
        time.sleep(settle_s)
    before, begun = Counted.of(server), time.perf_counter()
    measured = [one for one in numbered if one[1].epoch >= MEASURED_FROM]
    samples = asyncio.run(player.play(measured))
    after = Counted.of(server)
    return Replay(
        tuple(samples),
        begun,
        (after.found_tokens - before.found_tokens) / (after.asked_tokens - before.asked_tokens),
        (after.scan_s - before.scan_s) / (after.processor_s - before.processor_s),
    )


@contextmanager
def served(
    policy: Policy, shares: Mapping[str, float], pages: int, *arguments: str
) -> Iterator[Server]:
    """Serve the demo model to these tenants with a pool of so many pages."""
    told = (*policy.arguments, *arguments, "--kv-cache-memory-bytes", str(pages * page_bytes()))
    group = GROUP if policy.public else None
    with TemporaryDirectory() as folder, serving(Path(folder), shares, *told, group=group) as one:
        yield one


PARTS: Final = ("replay", "audit")


class Tried(NamedTuple):
    """What one policy cost and told, as far as it was asked."""

    played: Replay | None
    reports: list[AuditReport]


@dataclass(frozen=True, slots=True)
class Bench:
    """The trace and how to play it."""

    trace: Sequence[Ask]
    shape: Shape
    texts: Texts
    quick: bool
    parts: Sequence[str] = PARTS

    def attempt(self, policy: Policy, arguments: Sequence[str]) -> Tried:
        """Play the trace under one policy, then let it be attacked."""
        least = self.shape.tenants * (-(-self.shape.longest // sharing_trace.PAGE) + 2)
        needed = sharing_trace.isolation_pages(self.trace, self.shape)
        pages = max(int(POOL_SHARE * needed), least)
        shares = {tenant_name(n): 1 / self.shape.tenants for n in range(self.shape.tenants)}
        pool = ("--share-pool", f"{1 - least / pages:.4f}")
        if self.quick:
            # One server for both, a half each: nothing of a quick run is a figure of record.
            both = {name: part / 2 for name, part in (shares | AUDITED).items()}
            arguments = (*arguments, *epochs_of(QUICK_EPOCH_S))
            with served(policy, both, max(2 * pages, AUDIT_PAGES), *arguments, *pool) as server:
                alone = self._replay(server, policy, QUICK_EPOCH_S)
                return Tried(alone, [self._attack(server, policy, SEEDS[0], QUICK_EPOCH_S)])
        played: Replay | None = None
        reports: list[AuditReport] = []
        if "replay" in self.parts:
            told = (*arguments, *epochs_of(EPOCH_S), *pool)
            with served(policy, shares, pages, *told) as server:
                played = self._replay(server, policy, EPOCH_S)
        for seed in SEEDS if "audit" in self.parts else ():
            told = (*arguments, *epochs_of(AUDIT_EPOCH_S))
            with served(policy, AUDITED, AUDIT_PAGES, *told) as server:
                reports.append(self._attack(server, policy, seed, AUDIT_EPOCH_S))
        return Tried(played, reports)

    def _replay(self, server: Server, policy: Policy, epoch_s: float) -> Replay:
        return replay(server, self.trace, self.texts, self.shape, policy.settle_s(epoch_s))

    def _attack(self, server: Server, policy: Policy, seed: int, epoch_s: float) -> AuditReport:
        patient = policy.name in PRIVATE
        settle_s = policy.settle_s(epoch_s)
        report = attacked(server, seed, settle_s=settle_s, quick=self.quick, patient=patient)
        NOTES.print(f"{policy.name}, seed {seed}: {report.verdict} after {report.seconds:.0f} s")
        return report


def epochs_of(epoch_s: float) -> tuple[str, str]:
    """Return the arguments for epochs of so many seconds."""
    return ("--share-epoch-s", str(epoch_s))


def cpu_seconds(server: Server) -> float:
    """Return the processor time of the server's processes."""
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in server.tree())
    fields = (stat.rpartition(")")[2].split() for stat in stats)
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def ratios(found: Mapping[str, Replay]) -> list[Figure]:
    """Return the figures that compare two policies, request by request or window by window."""
    figures = []
    everything = found.get("share_all")
    for name, goal in (("selective", Goal("<=", 0.05)), ("isolate", None)):
        one = found.get(name)
        if one and everything:
            pairs = zip(one.samples, everything.samples, strict=True)
            overhead = [a.ttft_s / b.ttft_s - 1 for a, b in pairs]
            figures.append(Figure(f"ttft_overhead_{name}_vs_share_all", estimate(overhead), goal))
    selective, isolate = found.get("selective"), found.get("isolate")
    if selective and isolate:
        rates = zip(selective.window_rates(), isolate.window_rates(), strict=True)
        gain = estimate([a / b for a, b in rates])
        figures.append(Figure("throughput_selective_vs_isolate", gain, Goal(">=", 2.66)))
    if selective and everything:
        share = certain(selective.hit_ratio / everything.hit_ratio, len(selective.samples))
        figures.append(Figure("hit_ratio_selective_over_share_all", share, Goal(">=", 0.95)))
    if selective:
        share = certain(selective.scan_share, len(selective.samples))
        figures.append(Figure("scan_share", share, Goal("<=", 0.02)))
    return figures


def policy_row(policy: str, played: Replay, worst: Estimate | None) -> Row:
    """Return a policy's row: what it costs and what it tells."""
    ttft = [sample.ttft_s for sample in played.samples]
    return {
        "engine": "kvkeep",
        "policy": policy,
        "ttft_median_ms": float(np.median(ttft)) * 1e3,
        "ttft_p90_ms": float(np.percentile(ttft, 90)) * 1e3,
        "tokens_per_s": float(np.median(played.window_rates())),
        "hit_ratio": played.hit_ratio,
        "attack_auc": worst.median if worst else None,
        "attack_auc_halfwidth": (worst.high - worst.low) / 2 if worst else None,
    }


def asked(options: Options) -> tuple[list[str], list[Policy]]:
    """Return the parts and policies to measure: all, or those that `--only` names."""
    names = [policy.name for policy in POLICIES]
    unknown = sorted({*options.only} - {*PARTS, *names})
    if unknown:
        known = ", ".join((*PARTS, *names))
        raise ConfigError(f"only: there is no part {unknown[0]!r}; there are: {known}")
    wanted = QUICK_POLICIES if options.quick else names
    parts: list[str] = [part for part in PARTS if part in options.only]
    chosen = [name for name in wanted if name in options.only] or wanted
    return parts or [*PARTS], [policy for policy in POLICIES if policy.name in chosen]


def measure(options: Options) -> Report:
    """Play the trace and run the audits under every policy, or the parts that are asked for."""
    parts, policies = asked(options)
    shape = sharing_trace.QUICK if options.quick else sharing_trace.FULL
    trace = sharing_trace.make(shape) if options.quick else sharing_trace.read()
    threads = ("--threads", str(options.threads))
    bench = Bench(trace, shape, Texts(TextModel.load(DEMO_MODEL), shape), options.quick, parts)
    played: dict[str, Replay] = {}
    figures: list[Figure] = []
    rows: list[Row] = []
    seen: dict[str, Estimate] = {}
    attacks: list[Row] = []
    for policy in policies:
        tried = bench.attempt(policy, threads)
        if tried.played is not None:
            played[policy.name] = tried.played
        attacks += attack_rows(policy.name, tried.reports)
        told = attack_figures(policy.name, tried.reports)
        if told:
            seen[policy.name] = told[0].estimate
        figures += told
    rows += [policy_row(name, one, seen.get(name)) for name, one in played.items()]
    params: dict[str, Cell] = {
        "model": "demo",
        "threads": options.threads,
        "quick": options.quick,
        "parts": ", ".join(parts),
        "tenants": shape.tenants,
        "templates": f"{shape.templates} of {shape.template_tokens} tokens, Zipf(1)",
        "suffix_tokens": f"{shape.suffix_tokens[0]} to {shape.suffix_tokens[1]}",
        "answer_tokens": shape.answer_tokens,
        "requests_measured": len([ask for ask in trace if ask.epoch >= MEASURED_FROM]),
        "clients": CLIENTS,
        "pool": f"{POOL_SHARE:.0%} of what isolation needs",
    }
    return Report("sharing", params, [*ratios(played), *figures], [*rows, *attacks])


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("sharing", arguments, measure)
