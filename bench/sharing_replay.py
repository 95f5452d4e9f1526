"""Playing the trace of `kvkeep bench sharing` to a server, and what that took."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import httpx
import numpy as np

from bench.load import TIMEOUT_S
from bench.sharing_trace import MEASURED_FROM, Ask, Shape, Texts
from kvkeep import metrics
from kvkeep.metrics import Metric
from tests.servers import Server

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

    def __init__(self, server: Server, texts: Texts, shape: Shape, model: str = "demo") -> None:
        self.server = server
        self._model = model
        self._texts = texts
        self._shape = shape

    async def play(self, numbered: Sequence[tuple[int, Ask]]) -> list[Sample]:
        """Send requests in order, `CLIENTS` under way at a time."""
        left = iter(enumerate(numbered))
        samples: dict[int, Sample] = {}
        async with httpx.AsyncClient(base_url=self.server.url, timeout=TIMEOUT_S) as client:

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
        headers = {"Authorization": f"Bearer {self.server.keys[tenant_name(ask.tenant)]}"}
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


def replay(player: Player, trace: Sequence[Ask], settle_s: float) -> Replay:
    """Play the whole trace; measure from `MEASURED_FROM` on."""
    server = player.server
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


def cpu_seconds(server: Server) -> float:
    """Return the processor time of the server's processes."""
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in server.tree())
    fields = (stat.rpartition(")")[2].split() for stat in stats)
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")
