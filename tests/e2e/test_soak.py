"""Two hundred concurrent streams, a third of whose clients leave: everything comes back.

`SOAK_SECONDS` sets the duration (60 by default); `--log-cli-level=INFO` shows the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from kvkeep.server.tenants import TenantFile
from tests.servers import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS: Final = float(os.environ.get("SOAK_SECONDS", "60"))
STREAMS: Final = 200
LEAVING: Final = 1 / 3
HUNG_S: Final = 60.0
"""A client that hears nothing for so long is hung."""
GROWTH_BYTES: Final = 64 << 20
"""What the server's processes may have grown over their size after a first wave of streams."""
TENANTS: Final = {"harbour": 0.4, "library": 0.3, "market": 0.3}


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    sent: int = 0
    complete: int = 0
    left: int = 0
    tokens: int = 0
    """Of complete streams, by their usage."""
    wrong: list[str] = field(default_factory=list)

    @property
    def ended(self) -> int:
        return self.complete + self.left


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--kv-cache-memory-bytes", "256MiB", "--threads", "2", "--max-model-len", "1024")
    folder = tmp_path_factory.mktemp("soak")
    with serving(folder, TENANTS, *options, concurrency=2 * STREAMS) as running:
        yield running


def body(chance: random.Random) -> dict[str, Any]:
    """Return a request: a common opening, a part of its own, an answer of 1 to 48 tokens."""
    lines = chance.randint(1, 24)
    opening = " ".join(f"The access code of gate {i} is {1000 + i}." for i in range(lines))
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": f"{opening} {chance.random()}"}],
        "max_tokens": chance.randint(1, 48),
        "temperature": chance.choice([0.0, 1.0]),
        "ignore_eos": chance.random() < 0.8,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def read(response: httpx.Response, events: int | None, seen: Seen) -> int | None:
    """Read a stream: the tokens it tells of at its end, or None where it is left before."""
    last, read_events = "", 0
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return int(json.loads(last)["usage"]["completion_tokens"])
        last, read_events = line.removeprefix("data: "), read_events + 1
        if last.startswith('{"error"'):
            seen.wrong.append(last)
        if read_events == events:
            return None
    seen.wrong.append("a stream ended without [DONE]")
    return None


async def one(opened: httpx.AsyncClient, chance: random.Random, seen: Seen) -> None:
    """Send one request; a third leave, before the answer or within it."""
    leaves = chance.random() < LEAVING
    events = chance.randint(1, 24) if leaves and chance.random() < 0.7 else None
    patience_s = chance.uniform(0, 0.5) if leaves and events is None else None
    seen.sent += 1
    tokens = None
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(patience_s),
            opened.stream("POST", "/v1/chat/completions", json=body(chance)) as response,
        ):
            seen.statuses[response.status_code] += 1
            tokens = await read(response, events, seen)
    if tokens is None:
        seen.left += 1
    else:
        seen.complete += 1
        seen.tokens += tokens


async def soak(server: Server, seconds: float, seed: int) -> Seen:
    """Keep all streams busy for a while, then let those under way end."""
    seen, end = Seen(), time.monotonic() + seconds

    async def client(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        key = list(server.keys.values())[number % len(server.keys)]
        async with httpx.AsyncClient(
            base_url=server.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=HUNG_S,
            verify=False,
        ) as opened:
            while time.monotonic() < end:
                await one(opened, chance, seen)

    async with asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(client(number))
    return seen


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def idle(server: Server) -> bool:
    ready = server.ready()
    return (ready.in_flight, ready.engine.requests_running, ready.engine.requests_waiting) == (
        0,
        0,
        0,
    )


def http_statuses(server: Server) -> set[str]:
    page = server.admin("/metrics").text.splitlines()
    samples = [line for line in page if line.startswith("kvkeep:http_requests_total{")]
    return {sample.partition('status="')[2][:3] for sample in samples}


async def test_streams_come_and_go_and_leave_nothing(server: Server) -> None:
    first = await soak(server, min(5.0, SECONDS / 4), seed=1)
    assert wait_until(lambda: idle(server))
    start, before = server.rss_bytes(), server.ready().engine
    seen = await soak(server, SECONDS, seed=2)
    assert wait_until(lambda: idle(server)), "requests are left"
    after, growth = server.ready().engine, server.rss_bytes() - start
    ended = {reason: count - dict(before.finished)[reason] for reason, count in after.finished}
    figures = f"{seen}, {ended}, grew by {growth / 2**20:.1f} MiB from {start / 2**20:.0f} MiB"
    logging.getLogger(__name__).info(figures)

    assert seen.statuses.keys() == {200}
    assert not seen.wrong + first.wrong
    assert seen.sent == seen.ended > STREAMS
    assert seen.left >= seen.sent / 5
    assert not {status for status in http_statuses(server) if status.startswith("5")}
    assert (ended["error"], ended["deadline"]) == (0, 0)
    assert seen.complete <= ended["stop"] + ended["length"] <= seen.ended
    assert 0 < ended["cancelled"] <= seen.left
    assert sum(ended.values()) <= seen.ended
    assert after.generation_tokens_total - before.generation_tokens_total >= seen.tokens
    assert growth <= GROWTH_BYTES, f"{growth / 2**20:.1f} MiB"


async def test_pages_come_back_when_the_tenants_go(server: Server, tmp_path: Path) -> None:
    await soak(server, min(2.0, SECONDS / 4), seed=3)
    assert wait_until(lambda: idle(server))
    engine = server.ready().engine
    assert 0 < engine.pages_used == engine.pages_total - engine.pages_free
    file = TenantFile(server.log.with_name("keys.json"))
    for tenant in TENANTS:
        file.revoke(tenant)
    assert wait_until(lambda: server.ready().engine.pages_used == 0), "pages are held by nobody"
