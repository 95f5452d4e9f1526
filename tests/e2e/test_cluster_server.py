"""A real server over workers on Ray: the same API, a worker killed and restarted under it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.e2e.test_tiers_server import ask
from tests.servers import ADMIN_TOKEN, Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

TENANTS: Final = {"harbour": 0.4, "library": 0.4}


def workers(server: Server) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in server.admin("/ready").json()["engine"]["workers"]}


def post(server: Server, path: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    return httpx.post(server.admin_url + path, headers=headers, timeout=120)


def test_a_server_over_workers_answers_through_deaths_and_restarts(tmp_path: Path) -> None:
    options = ("--kv-cache-memory-bytes", "128MiB", "--threads", "1", "--share", "isolate")
    with serving(tmp_path, TENANTS, *options) as server:
        wanted = {tenant: ask(server, tenant)[0] for tenant in TENANTS}
    (folder := tmp_path / "cluster").mkdir()
    cluster = ("--cluster", "auto", "--cluster-decode", "2", "--cluster-least-tokens", "64")
    with serving(folder, TENANTS, *options, *cluster, "--cluster-epoch-s", "0.5") as server:
        tree = server.tree()
        assert {name: ask(server, name)[0] for name in TENANTS} == wanted
        assert all(ask(server, tenant)[1] > 0 for tenant in TENANTS), "found again"
        assert set(workers(server)) == {"prefill-0", "decode-0", "decode-1"}
        os.kill(workers(server)["decode-0"]["pid"], signal.SIGKILL)
        assert {name: ask(server, name)[0] for name in TENANTS} == wanted
        end = time.monotonic() + 120
        while workers(server)["decode-0"]["starts"] < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert post(server, "/workers/restart?name=prefill-0").status_code == 200
        assert post(server, "/workers/scale?role=decode&count=1").json()["changed"]
        assert set(workers(server)) == {"prefill-0", "decode-0"}
        assert {name: ask(server, name)[0] for name in TENANTS} == wanted
        assert post(server, "/purge?tenant=harbour").json()["pages"] > 0
        assert "kvkeep:" in server.admin("/metrics").text
        tree += server.tree()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in tree):
        assert time.monotonic() < end, "a process outlived its server"
        time.sleep(0.1)
