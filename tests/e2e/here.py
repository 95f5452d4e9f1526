"""A server in this process: real HTTP on loopback, an engine in a thread, epochs ended by hand."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
import msgspec

from kvkeep.engine import messages as m
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core, codec_of
from kvkeep.engine.client import MessageClient
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.evictors import evictor_of
from kvkeep.engine.local import ThreadTransport
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sharing import EpochTimer
from kvkeep.metrics import SAVED_TOKENS, SHARING_EPOCH, Metric
from kvkeep.models.text import TextModel
from kvkeep.server.options import Bind, ServerOptions
from kvkeep.server.serve import Listening, serve
from kvkeep.server.store import TenantStore
from kvkeep.server.tenants import TenantFile
from kvkeep.sharing.promotion import Promotion
from kvkeep.shield.policy import NoShield
from kvkeep.types import SharingPolicy
from tests.engine.test_sharing import ClearsAll, wait_for_scans
from tests.servers import ADMIN_TOKEN, Ready, started

EPOCH_S: Final = 60.0
QUIET_S: Final = 60.0


@dataclass
class Clock:
    """Time that passes when it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Host(Protocol):
    """A running server, here or elsewhere."""

    @property
    def url(self) -> str:
        """Return where it is asked."""

    async def quiet(self) -> None:
        """Wait until nobody's request is under way."""

    async def end_epoch(self) -> None:
        """Let the epoch that runs end, all prompts of it having been read."""

    async def saved_tokens(self) -> int:
        """Return the tokens that others' pages have saved."""


async def until_quiet(admin: httpx.AsyncClient) -> None:
    """Wait until nobody's request is under way."""
    async with asyncio.timeout(QUIET_S):
        while True:
            ready = msgspec.json.decode((await admin.get("/ready")).content, type=Ready)
            running = ready.engine.requests_running + ready.engine.requests_waiting
            if not ready.in_flight and not running:
                return
            await asyncio.sleep(0.002)


@dataclass
class Here:
    """A running server, its engine within reach."""

    url: str
    admin: httpx.AsyncClient
    engine: MessageClient
    core: EngineCore
    clock: Clock

    async def quiet(self) -> None:
        """Wait until nobody's request is under way."""
        await until_quiet(self.admin)

    async def saved_tokens(self) -> int:
        """Return the tokens that others' pages have saved."""
        return self.core.counters.saved_tokens

    async def end_epoch(self) -> None:
        """End the epoch that runs, all prompts of it having been read."""
        await self.quiet()
        if isinstance(self.core.sharing.policy, Promotion):
            await asyncio.to_thread(wait_for_scans, self.core.sharing.policy)
        self.clock.now += EPOCH_S
        for _ in range(2):  # the loop looks at the clock after it has answered the first
            await self.engine.stats()


@dataclass
class Elsewhere:
    """`kvkeep serve` in processes of its own: its epochs end by the clock."""

    url: str
    admin: httpx.AsyncClient

    async def quiet(self) -> None:
        """Wait until nobody's request is under way."""
        await until_quiet(self.admin)

    async def end_epoch(self) -> None:
        """Wait for two epochs' ends: between them is a whole one."""
        await self.quiet()
        until = await self._gauge(SHARING_EPOCH) + 2
        async with asyncio.timeout(QUIET_S):
            while True:
                if await self._gauge(SHARING_EPOCH) >= until:
                    return
                await asyncio.sleep(0.05)

    async def saved_tokens(self) -> int:
        """Return the tokens that others' pages have saved."""
        return int(await self._gauge(SAVED_TOKENS))

    async def _gauge(self, metric: Metric) -> float:
        page = (await self.admin.get("/metrics")).text
        found = re.search(rf"^{metric.full_name}(?:_total)?{{.*}} (\S+)$", page, re.MULTILINE)
        assert found is not None, metric.full_name
        return float(found[1])


@asynccontextmanager
async def serving_elsewhere(
    file: TenantFile, keys: Mapping[str, str], *arguments: str
) -> AsyncIterator[Elsewhere]:
    """Serve in other processes; the detector is the real one."""
    with started(file, keys, *arguments) as server:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with httpx.AsyncClient(base_url=server.admin_url, headers=headers) as admin:
            yield Elsewhere(server.url, admin)


@asynccontextmanager
async def serving_here(
    options: EngineOptions, keys: Path, policy: SharingPolicy | None = None
) -> AsyncIterator[Here]:
    """Serve with real HTTP and a detector that misses everything; `policy` as in `Parts`."""
    clock, made = Clock(), list[EngineCore]()

    def build(reply: m.Sink) -> EngineCore:
        techniques = Techniques(codec_of(options), NoShield(), evictor_of(options))
        parts = Parts(techniques=techniques, inspector=ClearsAll(), policy=policy)
        core = build_core(options, reply, parts)
        core.epochs = EpochTimer(EPOCH_S, clock)
        made.append(core)
        return core

    engine = MessageClient(ThreadTransport(build))
    heard: asyncio.Future[Listening] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(
            engine,
            TextModel.load(Path(options.model)),
            TenantStore.open(keys),
            ServerOptions(poll_s=600.0, drain_s=0.0),
            public=Bind(),
            admin=Bind(),
            admin_token=ADMIN_TOKEN,
            announce=heard.set_result,
        )
    )
    starts: set[asyncio.Future[Any]] = {task, heard}
    await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done():
            task.result()
        at = heard.result()
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with httpx.AsyncClient(base_url=at.admin.url(), headers=headers) as admin:
            yield Here(at.public.url(), admin, engine, made[0], clock)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
