from __future__ import annotations

from dataclasses import dataclass, field

import httpx
import pytest
from starlette.applications import Starlette

from kvkeep.errors import ConfigError, EngineStopped
from kvkeep.server.admin import create_admin_app
from kvkeep.server.app import create_app
from kvkeep.server.options import ServerOptions
from kvkeep.server.store import TenantStore
from tests.server.fakes import ByteText, FakeEngine

HEADERS = {"Authorization": "Bearer token"}


@dataclass
class FakeWorkers:
    """Takes note of what is asked of a cluster's workers."""

    asked: list[tuple[object, ...]] = field(default_factory=list)

    async def restart(self, name: str) -> None:
        if name == "nobody":
            raise ConfigError("worker: there is none called 'nobody' that lives")
        if name == "broken":
            raise EngineStopped("worker broken is lost")
        self.asked.append((name,))

    async def restart_all(self) -> None:
        self.asked.append(("all",))

    async def scale(self, role: str, count: int) -> None:
        self.asked.append((role, count))


def admin_of(workers: FakeWorkers | None) -> Starlette:
    app = create_app(FakeEngine(), ByteText(), TenantStore.local(), ServerOptions(no_auth=True))
    return create_admin_app(app.state.frontend, "token", workers)


async def post(app: Starlette, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        return await client.post(path, headers=headers or HEADERS)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/workers/restart", ("all",)),
        ("/workers/restart?name=decode-0", ("decode-0",)),
        ("/workers/scale?role=prefill&count=0", ("prefill", 0)),
        ("/workers/scale?role=decode&count=3", ("decode", 3)),
    ],
)
async def test_an_operator_changes_the_workers(path: str, asked: tuple[object, ...]) -> None:
    workers = FakeWorkers()
    answer = await post(admin_of(workers), path)
    assert (answer.status_code, answer.json()["changed"]) == (200, True)
    assert workers.asked == [asked]


@pytest.mark.parametrize(
    ("path", "status", "why"),
    [
        ("/workers/restart?name=nobody", 409, "none called 'nobody'"),
        ("/workers/restart?name=broken", 503, "broken is lost"),
        ("/workers/scale?role=both&count=1", 400, "role: must be prefill or decode"),
        ("/workers/scale?role=decode&count=-1", 400, "count: must be a whole number"),
        ("/workers/scale?role=decode&count=1000", 400, "count: must be a whole number"),
        ("/workers/scale?role=decode", 400, "count: must be a whole number"),
    ],
)
async def test_what_cannot_be_changed_is_told(path: str, status: int, why: str) -> None:
    workers = FakeWorkers()
    answer = await post(admin_of(workers), path)
    assert answer.status_code == status
    assert why in answer.text
    assert not workers.asked


async def test_workers_are_the_operators_and_a_clusters_alone() -> None:
    workers = FakeWorkers()
    refused = await post(admin_of(workers), "/workers/restart", Authorization="Bearer other")
    assert refused.status_code == 401
    assert not workers.asked
    assert (await post(admin_of(None), "/workers/restart")).status_code == 404
