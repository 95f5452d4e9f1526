"""A prefill and a decode worker in threads of this process, joined as a front end joins them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvkeep.disagg.beside import build_beside, side_of
from kvkeep.disagg.decode import DecodeSide
from kvkeep.disagg.handover import SplitClient
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.prefill import PrefillSide
from kvkeep.engine import messages as m
from kvkeep.engine.api import Chunk, ChunkStream, EngineClient, GenerateRequest
from kvkeep.engine.client import MessageClient
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.local import ThreadTransport
from kvkeep.engine.options import EngineOptions

QUICK = LinkOptions(beat_s=0.05, silence_s=10.0, dial_s=5.0)


@dataclass
class Worker:
    """One worker, and what a test may look at inside."""

    role: Role
    engine: EngineOptions
    link: LinkOptions
    side: PrefillSide | DecodeSide = field(init=False)
    core: EngineCore = field(init=False)

    def start(self) -> MessageClient:
        """Return its client."""
        return MessageClient(ThreadTransport(self._build, self._beside))

    def _beside(self, inbox: m.Inbox) -> PrefillSide | DecodeSide:
        self.side = side_of(self.role, self.engine, self.link, inbox)
        return self.side

    def _build(self, reply: m.Sink) -> EngineCore:
        self.core = build_beside(self.engine, self.side, reply)
        return self.core


@dataclass
class Pair:
    """Both workers and the client over them."""

    prefill: Worker
    decode: Worker
    client: SplitClient

    @property
    def sends(self) -> PrefillSide:
        """Return the side that sends."""
        assert isinstance(self.prefill.side, PrefillSide)
        return self.prefill.side

    @property
    def receives(self) -> DecodeSide:
        """Return the side that receives."""
        assert isinstance(self.decode.side, DecodeSide)
        return self.decode.side

    def faults(self) -> dict[str, int]:
        """Return what went wrong on either side."""
        return {**self.decode.side.faults.counts, **self.prefill.side.faults.counts}

    async def quiet(self, within_s: float = 15.0) -> None:
        """Wait until neither side has anything on its way, and no page is held by anybody."""
        await until(lambda: not self.leaks(), within_s)

    def leaks(self) -> list[str]:
        """Return what is still held."""
        return held(self.prefill) + held(self.decode)


def held(worker: Worker) -> list[str]:
    """Return the transfers of a worker, and its pages that are neither free nor unused."""
    found = [f"{worker.role}: {worker.side.pending} transfers"] * bool(worker.side.pending)
    for manager in worker.core.caches.managers.values():
        stats = manager.stats()
        unused = sum(use.unreferenced_pages for use in stats.accounts.values())
        if stats.open_views or stats.pages_used != unused:
            found.append(f"{worker.role}: {stats}")
    return found


async def until(condition: Callable[[], bool], within_s: float = 15.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def engine_options(model: Path, **options: Any) -> EngineOptions:
    """Return small engines' options."""
    settings = {"threads": 1, "chunk_tokens": 128, "kv_cache_bytes": 32 << 20, **options}
    return EngineOptions(model=str(model), **settings)


@asynccontextmanager
async def pair_of(
    engine: EngineOptions,
    *,
    link: LinkOptions = QUICK,
    other: EngineOptions | None = None,
    least_tokens: int = 64,
    patience_s: float = 20.0,
    whole: bool = False,
) -> AsyncIterator[Pair]:
    """Yield two workers of equal engines (or the decode worker of another) for two tenants."""
    prefill, decode = Worker("prefill", engine, link), Worker("decode", other or engine, link)
    there, here = prefill.start(), decode.start()
    client = SplitClient(there, here, least_tokens=least_tokens, patience_s=patience_s, whole=whole)
    try:
        await client.info()
        await client.set_tenants({"a": 0.5, "b": 0.5})
        yield Pair(prefill, decode, client)
    finally:
        await client.close()


async def answer(stream: ChunkStream) -> list[Chunk]:
    """Return a stream's chunks."""
    return [chunk async for chunk in stream]


async def answers(client: EngineClient, *asked: GenerateRequest) -> list[list[Chunk]]:
    """Return the chunks of several requests that run at a time."""
    return await asyncio.gather(*[answer(client.submit(one)) for one in asked])
