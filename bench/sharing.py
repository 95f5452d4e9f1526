"""What sharing is worth and what it tells: every policy the server has, on one committed trace.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple, get_args

import httpx
import numpy as np

from bench import harness, sharing_trace
from bench.harness import Cell, Estimate, Figure, Goal, Options, Report, Row, estimate
from bench.load import TIMEOUT_S
from bench.sharing_trace import MEASURED_FROM, Ask, Shape, Texts
from kvkeep import metrics
from kvkeep.audit import Finding, audit, cast_of
from kvkeep.audit import Options as AuditOptions
from kvkeep.audit import Report as AuditReport
from kvkeep.cli.console import NOTES
from kvkeep.config import DEMO_MODEL, Settings
from kvkeep.models.text import TextModel
from tests.servers import Server, serving

POOL_SHARE: Final = 0.3
CLIENTS: Final = 4
WINDOWS: Final = 12
"""Parts of the measured requests, for intervals of rates."""
SEEDS: Final = (1, 2, 3)
INDEX_CHANNELS: Final = (
    "ttft",
    "early_bird",
    "cached_tokens",
    "reply_order",
    "sybils",
    "boundary",
    "sentinel",
)
AUDITED: Final = {"victim": 0.3, "attacker": 0.3, "sybil-1": 0.1, "sybil-2": 0.1}
"""Beside the attacker k - 1 accounts; what they leave of the pool holds public pages."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy by the name figures use, and how a server is told."""

    name: str
    choices: tuple[str, ...]
    """Values of `--share`, the first that the server knows."""
    flags: tuple[str, ...] = ()
    public: bool = True
    """Whether the pool beyond what every tenant needs for one request is left to public pages."""


POLICIES: Final = (
    Policy("isolate", ("isolate", "nothing"), public=False),
    Policy("selective", ("selective",)),
    Policy("dp", ("dp",)),
    Policy("salt", ("salt",), public=False),
    Policy("safekv", ("safekv",)),
    Policy("share_all", ("share_all", "all"), ("--unsafe-share-all",)),
)
EPOCH_SETTING: Final = "share_epoch_s"
SCAN_SECONDS: Final = f"{metrics.PREFIX}share_scan_seconds_total"
"""Processor time of the detector; where a server does not count it there is no `scan_share`."""


def arguments_of(policy: Policy) -> tuple[str, ...] | None:
    """Return the command line of a policy, None where the server does not have it."""
    known = get_args(Settings.model_fields["share"].annotation)
    choice = next((choice for choice in policy.choices if choice in known), None)
    return None if choice is None else ("--share", choice, *policy.flags)


def has_epochs() -> bool:
    """Tell whether the server decides what is public at epochs' ends."""
    return EPOCH_SETTING in Settings.model_fields


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
    scan_share: float | None

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


def counter(server: Server, name: str) -> float | None:
    """Return the sum of a counter on the admin port's metrics page, None where it has none."""
    page = server.admin("/metrics").text
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, found)) if found else None


def hits(server: Server) -> tuple[float, float]:
    """Return tokens found and tokens looked up."""
    counted = (metrics.PREFIX_HITS, metrics.PREFIX_QUERIES)
    found, asked = (counter(server, f"{metric.full_name}_total") for metric in counted)
    if found is None or asked is None:
        raise RuntimeError("the metrics page has no prefix cache counters")
    return found, asked


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
    arguments: Sequence[str], trace: Sequence[Ask], shape: Shape, epoch_s: float, *, public: bool
) -> Replay:
    """Play the whole trace under one policy; measure from `MEASURED_FROM` on."""
    least = shape.tenants * (-(-shape.longest // sharing_trace.PAGE) + 2)
    pages = max(int(POOL_SHARE * sharing_trace.isolation_pages(trace, shape)), least)
    reserved = least / pages if public else 1.0
    shares = {tenant_name(t): reserved / shape.tenants for t in range(shape.tenants)}
    memory = ("--kv-cache-memory-bytes", str(pages * page_bytes()))
    texts = Texts(TextModel.load(DEMO_MODEL), shape)
    with (
        TemporaryDirectory() as folder,
        serving(Path(folder), shares, *arguments, *memory) as server,
    ):
        player = Player(server, texts, shape)
        numbered = list(enumerate(trace))
        for epoch in range(1, MEASURED_FROM):
            asyncio.run(player.play([one for one in numbered if one[1].epoch == epoch]))
            if has_epochs():
                time.sleep(2 * epoch_s)  # what epoch e offers is public at the end of e + 1
        before, scanned, worked = hits(server), counter(server, SCAN_SECONDS), cpu_seconds(server)
        begun = time.perf_counter()
        measured = [one for one in numbered if one[1].epoch >= MEASURED_FROM]
        samples = asyncio.run(player.play(measured))
        after, scanned_after = hits(server), counter(server, SCAN_SECONDS)
        ratio = (after[0] - before[0]) / (after[1] - before[1])
        scan_share = None
        if scanned is not None and scanned_after is not None:
            scan_share = (scanned_after - scanned) / (cpu_seconds(server) - worked)
        return Replay(tuple(samples), begun, ratio, scan_share)


def cpu_seconds(server: Server) -> float:
    """Return the processor time of the server's processes."""
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in server.tree())
    fields = (stat.rpartition(")")[2].split() for stat in stats)
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def attacked(arguments: Sequence[str], seed: int, options: Options, epoch_s: float) -> AuditReport:
    """Return the audit of a fresh server under one policy."""
    memory = ("--kv-cache-memory-bytes", "1GiB")
    with (
        TemporaryDirectory() as folder,
        serving(Path(folder), AUDITED, *arguments, *memory) as server,
    ):
        told = AuditOptions(
            server.url,
            cast_of([f"{name}={server.keys[name]}" for name in AUDITED]),
            channels=INDEX_CHANNELS[:3:2] if options.quick else INDEX_CHANNELS,
            margin=0.2 if options.quick else 0.03,
            seconds=8.0 if options.quick else 3600.0,
            least_pairs=0 if options.quick else 128,
            settle_s=2 * epoch_s if has_epochs() else 0.0,
            batch=128 if has_epochs() else 4,
            per_second=1000.0,
            prompt_tokens=512,
            seed=seed,
        )
        return asyncio.run(audit(told))


def attack_figures(policy: str, reports: Sequence[AuditReport]) -> list[Figure]:
    """Return the worst channel's AUC over all seeds, its half-width, and if chance is inside."""
    weighed = [
        finding.evidence
        for report in reports
        for finding in report.channels
        if finding.evidence is not None
    ]
    if not weighed:
        return []
    worst = max(weighed, key=lambda evidence: abs(evidence.auc.value - 0.5)).auc
    pairs = min(evidence.pairs for evidence in weighed)
    width = max(evidence.auc.halfwidth for evidence in weighed)
    inside = float(all(evidence.auc.holds_chance for evidence in weighed))
    safe = policy in {"isolate", "selective", "dp"}
    name = f"attack_auc_private_{policy}"
    figures = [
        Figure(
            name,
            Estimate(worst.value, worst.low, worst.high, pairs),
            Goal(">=", 0.95) if policy == "share_all" else None,
        )
    ]
    if safe:
        figures += [
            Figure(f"{name}_halfwidth", certain(width, pairs), Goal("<=", 0.03)),
            Figure(f"{name}_holds_chance", certain(inside, pairs), Goal(">=", 1.0)),
        ]
    return figures


def certain(value: float, samples: int) -> Estimate:
    """Return an estimate without an interval of its own."""
    return Estimate(value, value, value, samples)


def attack_row(policy: str, seed: int, finding: Finding) -> Row:
    """Return a channel of one audit as a row."""
    evidence = finding.evidence
    return {
        "policy": policy,
        "seed": seed,
        "channel": finding.facts.name,
        "outcome": finding.outcome,
        "auc": evidence.auc.value if evidence else None,
        "halfwidth": evidence.auc.halfwidth if evidence else None,
        "pairs": evidence.pairs if evidence else None,
    }


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
    if selective and selective.scan_share is not None:
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


def measure(options: Options) -> Report:
    """Play the trace and run the audits under every policy that the server has."""
    shape = sharing_trace.QUICK if options.quick else sharing_trace.FULL
    trace = sharing_trace.make(shape) if options.quick else sharing_trace.read()
    epoch_s = 1.0 if options.quick else 10.0
    timing = ("--share-epoch-s", str(epoch_s)) if has_epochs() else ()
    threads = ("--threads", str(options.threads))
    played: dict[str, Replay] = {}
    figures: list[Figure] = []
    rows: list[Row] = []
    seen: dict[str, Estimate] = {}
    attacks: list[Row] = []
    for policy in POLICIES:
        arguments = arguments_of(policy)
        if arguments is None:
            NOTES.print(f"{policy.name}: left out, the server does not have this policy")
            continue
        told = (*arguments, *timing, *threads)
        played[policy.name] = replay(told, trace, shape, epoch_s, public=policy.public)
        seeds = SEEDS[:1] if options.quick else SEEDS
        reports = [attacked(told, seed, options, epoch_s) for seed in seeds]
        attacks += [
            attack_row(policy.name, seed, finding)
            for seed, report in zip(seeds, reports, strict=True)
            for finding in report.channels
        ]
        told_by_attack = attack_figures(policy.name, reports)
        if told_by_attack:
            seen[policy.name] = told_by_attack[0].estimate
        figures += told_by_attack
    rows += [policy_row(name, one, seen.get(name)) for name, one in played.items()]
    params: dict[str, Cell] = {
        "model": "demo",
        "threads": options.threads,
        "quick": options.quick,
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
