"""Playing the trace of `kvkeep bench sharing` to a server, and what that took."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import httpx
import numpy as np

from bench.harness import Cell, Estimate, Row
from bench.load import TIMEOUT_S
from bench.sharing_target import Target
from bench.sharing_trace import MEASURED_FROM, POOL_SHARE, Ask, Shape, Texts

OURS: Final = "kvkeep"
CLIENTS: Final = 4
WINDOWS: Final = 12
"""Parts of the measured requests, for intervals of rates."""


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
    rates: tuple[float, ...]
    """Tokens per second of each window."""
    hit_ratio: float
    scan_share: float
    """Of the server's processor time: the detector's."""


class Player:
    """Plays a trace to one server."""

    def __init__(self, target: Target, texts: Texts, shape: Shape, model: str = "demo") -> None:
        self.target = target
        self._model = model
        self._texts = texts
        self._shape = shape

    async def play(self, numbered: Sequence[tuple[int, Ask]]) -> list[Sample]:
        """Send requests in order, `CLIENTS` under way at a time."""
        left = iter(enumerate(numbered))
        samples: dict[int, Sample] = {}
        async with httpx.AsyncClient(
            base_url=self.target.url, timeout=TIMEOUT_S, transport=self.target.transport()
        ) as client:

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
            "model": self._model,
            "prompt": prompt,
            "max_tokens": self._shape.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {self.target.keys[tenant_name(ask.tenant)]}"}
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


def warm_up(player: Player, trace: Sequence[Ask], settle_s: float) -> None:
    """Play what comes before `MEASURED_FROM`, and wait after each epoch."""
    for epoch in range(1, MEASURED_FROM):
        asyncio.run(player.play([one for one in enumerate(trace) if one[1].epoch == epoch]))
        time.sleep(settle_s)


def replay(player: Player, trace: Sequence[Ask], settle_s: float) -> Replay:
    """Play the whole trace to one server; measure from `MEASURED_FROM` on."""
    warm_up(player, trace, settle_s)
    before, begun = player.target.counted(), time.perf_counter()
    samples = asyncio.run(player.play(measured_of(trace)))
    grown = player.target.counted().since(before)
    rates = window_rates(samples, begun)
    return Replay(tuple(samples), rates, grown.hit_ratio, grown.scan_share)


def window_rates(samples: Sequence[Sample], begun_s: float) -> tuple[float, ...]:
    """Return tokens per second in parts of equal numbers of requests, by time of ending."""
    ordered = sorted(samples, key=lambda sample: sample.ended_s)
    since, rates = begun_s, []
    for part in np.array_split(np.arange(len(ordered)), WINDOWS):
        until = ordered[part[-1]].ended_s
        rates.append(sum(ordered[i].tokens for i in part) / (until - since))
        since = until
    return tuple(rates)


def take_turns(players: Mapping[str, Player], trace: Sequence[Ask]) -> dict[str, Replay]:
    """Play what is measured window by window, each to every warm server before the next.

    Who is first changes from window to window. Processor time is that of a server's own windows.
    """
    measured = measured_of(trace)
    before = {name: player.target.counted() for name, player in players.items()}
    samples: dict[str, list[Sample]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    busy_s: dict[str, float] = defaultdict(float)
    names = [*players]
    for turn, part in enumerate(np.array_split(np.arange(len(measured)), WINDOWS)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            player = players[name]
            idle, begun = player.target.counted(), time.perf_counter()
            played = asyncio.run(player.play([measured[i] for i in part]))
            rates[name].append(sum(one.tokens for one in played) / (time.perf_counter() - begun))
            samples[name] += played
            busy_s[name] += player.target.counted().since(idle).processor_s
    found = {}
    for name, player in players.items():
        grown = player.target.counted().since(before[name])._replace(processor_s=busy_s[name])
        told = tuple(samples[name]), tuple(rates[name])
        found[name] = Replay(*told, grown.hit_ratio, grown.scan_share)
    return found


def measured_of(trace: Sequence[Ask]) -> list[tuple[int, Ask]]:
    """Return the numbered requests that are measured."""
    return [one for one in enumerate(trace) if one[1].epoch >= MEASURED_FROM]


def played_params(trace: Sequence[Ask], shape: Shape) -> dict[str, Cell]:
    """Return what a report says of the trace and how it was played."""
    return {
        "tenants": shape.tenants,
        "templates": f"{shape.templates} of {shape.template_tokens} tokens, Zipf(1)",
        "suffix_tokens": f"{shape.suffix_tokens[0]} to {shape.suffix_tokens[1]}",
        "answer_tokens": shape.answer_tokens,
        "requests_measured": len(measured_of(trace)),
        "clients": CLIENTS,
        "pool": f"{POOL_SHARE:.0%} of what isolation needs",
    }


def policy_row(engine: str, model: str, policy: str, played: Replay, worst: Estimate | None) -> Row:
    """Return a policy's row: what it costs and what it tells."""
    ttft = [sample.ttft_s for sample in played.samples]
    return {
        "engine": engine,
        "model": model,
        "policy": policy,
        "ttft_median_ms": float(np.median(ttft)) * 1e3,
        "ttft_p90_ms": float(np.percentile(ttft, 90)) * 1e3,
        "tokens_per_s": float(np.median(played.rates)),
        "hit_ratio": played.hit_ratio,
        "attack_auc": worst.median if worst else None,
        "attack_auc_halfwidth": (worst.high - worst.low) / 2 if worst else None,
    }
