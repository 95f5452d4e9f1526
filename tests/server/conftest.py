"""A real server on a loopback port, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from kvkeep.server.options import Bind, ServerOptions
from kvkeep.server.serve import Listening, serve
from kvkeep.server.store import TenantStore
from kvkeep.server.tenants import TenantFile
from tests.server.fakes import ByteText, FakeEngine

ADMIN_TOKEN = "admin-token-for-tests"


@dataclass
class Running:
    """A server under test and how to reach it."""

    engine: FakeEngine
    url: str
    admin_url: str
    file: TenantFile
    key: str
    """Of tenant `acme`."""
    gateway_key: str
    """Of tenant `gw`, a gateway with children `a` and `b`."""
    task: asyncio.Task[None]

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20, verify=False)

    def admin(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        return httpx.AsyncClient(base_url=self.admin_url, headers=headers, timeout=20, verify=False)


Start = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return a context manager that runs a server: `start(engine, options)`."""

    @asynccontextmanager
    async def run(
        engine: FakeEngine | None = None, options: ServerOptions | None = None
    ) -> AsyncIterator[Running]:
        engine, options = engine or FakeEngine(), options or ServerOptions(poll_s=0.05, drain_s=0.2)
        file = TenantFile(tmp_path / "tenants.json")
        key = file.add("acme", share=0.5, concurrency=128)
        gateway = file.add("gw", share=0.4, gateway=True, children={"a": 0.5, "b": 0.25})
        store = TenantStore.local() if options.no_auth else TenantStore.open(file.path)
        heard: asyncio.Future[Listening] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            serve(
                engine,
                ByteText(),
                store,
                options,
                public=Bind(),
                admin=Bind(),
                admin_token=ADMIN_TOKEN,
                announce=heard.set_result,
            )
        )
        listening = await heard
        server = Running(
            engine,
            listening.public.url(),
            listening.admin.url(),
            file,
            key.text,
            gateway.text,
            task,
        )
        try:
            yield server
        finally:
            await stop(server)

    return run


async def stop(server: Running) -> None:
    """End a server as a cancelled `serve` does."""
    server.task.cancel()
    await asyncio.gather(server.task, return_exceptions=True)


async def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until `condition` holds, or fail."""
    async with asyncio.timeout(timeout_s):
        while True:
            held = condition()
            if await held if asyncio.iscoroutine(held) else held:
                return
            await asyncio.sleep(0.01)
