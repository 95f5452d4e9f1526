"""The two ports: their start, their end, and a tenant file that changes while they run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from pathlib import Path

import httpx
import pytest

from kvkeep.engine.api import TenantTerms
from kvkeep.errors import ConfigError
from kvkeep.server.options import Bind, ServerOptions
from kvkeep.server.serve import _tcp_socket, serve
from kvkeep.server.store import TenantStore
from tests.server.conftest import ADMIN_TOKEN, Running, Start, wait_for
from tests.server.fakes import MODEL, REPLY, ByteText, FakeEngine

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 13}
ANY_PORT = Bind()
LOCAL = ServerOptions(no_auth=True, drain_s=0.2, poll_s=0.05)


async def run(
    engine: FakeEngine,
    options: ServerOptions = LOCAL,
    public: Bind = ANY_PORT,
    admin: Bind = ANY_PORT,
) -> None:
    await serve(
        engine,
        ByteText(),
        TenantStore.local(),
        options,
        public=public,
        admin=admin,
        admin_token=ADMIN_TOKEN,
    )


async def test_sigterm_lets_running_requests_end_and_takes_no_more(start: Start) -> None:
    options = ServerOptions(drain_s=5, poll_s=0.05)
    async with start(FakeEngine(delay_s=0.05), options) as server, server.client() as http:
        await http.get("/health")
        request = asyncio.create_task(http.post(CHAT, json=BODY | {"stream": True}))
        await wait_for(lambda: server.engine.live)
        os.kill(os.getpid(), signal.SIGTERM)
        answer = await request
        assert answer.text.count('"content":"') == 1 + len(REPLY[:12])
        assert answer.text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(server.task, 3)
        assert server.engine.shut
        with pytest.raises(httpx.ConnectError):
            await http.get("/health")


async def test_while_draining_an_open_connection_is_told_503(start: Start) -> None:
    async with (
        start(FakeEngine(delay_s=0.05), ServerOptions(drain_s=5)) as server,
        server.client() as http,
        server.admin() as admin,
    ):
        request = asyncio.create_task(http.post(CHAT, json=BODY))
        await wait_for(lambda: server.engine.live)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        ready = await admin.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert (await request).status_code == 200


async def test_what_outlasts_the_drain_is_ended_with_a_clear_error(start: Start) -> None:
    options = ServerOptions(drain_s=0.3, poll_s=0.05)
    async with start(FakeEngine(delay_s=60), options) as server, server.client() as http:
        streamed = asyncio.create_task(http.post(CHAT, json=BODY | {"stream": True}))
        whole = asyncio.create_task(http.post(CHAT, json=BODY))
        await wait_for(lambda: len(server.engine.live) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert "shutting down" in (await streamed).text
        answer = await whole
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        await asyncio.wait_for(server.task, 4)
        assert not server.engine.live


async def test_a_second_signal_ends_at_once(start: Start) -> None:
    async with (
        start(FakeEngine(delay_s=60), ServerOptions(drain_s=60)) as server,
        server.client() as http,
    ):
        request = asyncio.create_task(http.post(CHAT, json=BODY))
        await wait_for(lambda: server.engine.live)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await asyncio.wait_for(request, 2)).status_code == 503
        await asyncio.wait_for(server.task, 2)


async def test_a_port_in_use_is_one_clear_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: can't listen on 127.0.0.1:{port}"):
            await run(FakeEngine(), public=Bind(port=port))


async def test_open_doors_are_refused() -> None:
    with pytest.raises(ConfigError, match="no_auth"):
        await run(FakeEngine(), public=Bind(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="admin"):
        await run(FakeEngine(), admin=Bind(host="0.0.0.0"))


async def test_an_engine_that_does_not_start_is_raised(tmp_path: Path) -> None:
    class Broken(FakeEngine):
        async def set_tenants(
            self, quotas: dict[str, float], terms: dict[str, TenantTerms] | None = None
        ) -> None:
            raise ConfigError("share: too small for one page")

    with pytest.raises(ConfigError, match="too small"):
        await run(Broken())


async def test_the_admin_port_can_be_a_private_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.touch()
    with pytest.raises(ConfigError, match="socket: can't listen"):
        await run(FakeEngine(), admin=Bind(unix=path))
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    task = asyncio.create_task(run(FakeEngine(), admin=Bind(unix=path)))
    await wait_for(lambda: path.exists() and stat.S_IMODE(path.stat().st_mode) == 0o600)
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as http:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}

        async def warm() -> bool:
            return (await http.get("/ready", headers=headers)).status_code == 200

        await wait_for(warm)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not path.exists()


def test_small_answers_are_not_held_back_by_the_kernel() -> None:
    """asyncio sets TCP_NODELAY only on sockets that name their protocol; without it: 40 ms more."""
    with _tcp_socket(Bind()) as sock:
        assert sock.proto == socket.IPPROTO_TCP


async def test_without_authentication_each_connection_has_its_own_scope(start: Start) -> None:
    async with start(options=LOCAL) as server:
        for _ in range(2):
            async with server.client("none") as http:
                for _ in range(2):
                    assert (await http.post(CHAT, json=BODY)).status_code == 200
        scopes = [r.scope for r in server.engine.requests]
        assert scopes[0] == scopes[1] != scopes[2] == scopes[3]
        assert {r.tenant for r in server.engine.requests} == {"local"}
        async with server.client("none") as http:
            answer = await http.post(CHAT, json=BODY, headers={"X-Forwarded-For": "1.2.3.4"})
            assert answer.status_code == 403


async def test_the_same_port_used_again_is_another_connection(start: Start) -> None:
    """Whoever binds a former client's source port must not find its pages."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with start(options=LOCAL) as server:
        for _ in range(2):
            await _ask_from(port, server)
        one, two = server.engine.requests
        assert one.scope != two.scope


async def _ask_from(port: int, server: Running) -> None:
    host, to = server.url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.bind(("127.0.0.1", port))
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(to)))
    reader, writer = await asyncio.open_connection(sock=sock)
    body = b'{"model": "tiny", "prompt": "x"}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    assert b" 200 " in await reader.readline()
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_a_new_tenant_is_served_without_a_restart(start: Start) -> None:
    async with start() as server:
        key = server.file.add("late", share=0.1).text

        async def served() -> bool:
            async with server.client(key) as http:
                return (await http.post(CHAT, json=BODY)).status_code == 200

        await wait_for(served)
        assert server.engine.quotas[-1] == pytest.approx(
            {"acme": 0.5, "gw": 0.1, "gw/a": 0.2, "gw/b": 0.1, "late": 0.1}
        )
        assert server.engine.requests[-1].tenant == "late"


@pytest.mark.parametrize("stream", [False, True])
async def test_revoking_a_key_cancels_what_runs_under_it_alone(start: Start, stream: bool) -> None:
    async with start(FakeEngine(delay_s=0.1)) as server:
        new = server.file.rotate("acme")
        async with server.admin() as admin:
            await admin.post("/reload")
        async with server.client() as old, server.client(new.text) as kept:
            doomed = asyncio.create_task(old.post(CHAT, json=BODY | {"stream": stream}))
            lasting = asyncio.create_task(kept.post(CHAT, json=BODY))
            await wait_for(lambda: len(server.engine.live) == 2)
            await asyncio.sleep(0.25)
            server.file.revoke("acme", server.key.split("_")[1])
            answer = await asyncio.wait_for(doomed, 1)
            assert answer.status_code == (200 if stream else 401)
            assert "no longer valid" in answer.text
            assert (await old.get("/v1/models")).status_code == 401
            assert (await lasting).json()["choices"][0]["message"]["content"] == REPLY[:12]
        assert len(server.engine.closed) == 1


async def test_a_broken_tenant_file_changes_nothing(start: Start) -> None:
    async with start() as server, server.client() as http, server.admin() as admin:
        good = server.file.path.read_bytes()
        server.file.path.write_bytes(b"{")
        answer = await admin.post("/reload")
        assert (answer.status_code, answer.json()["reloaded"]) == (409, False)
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        server.file.path.write_bytes(good)
        assert (await admin.post("/reload")).status_code == 200
        page = (await admin.get("/metrics")).text
        assert "kvkeep:tenant_reload_failures_total 0.0" not in page
        assert (await http.post(CHAT, json=BODY)).status_code == 200


async def test_scopes_follow_tenant_subject_and_salt(start: Start) -> None:
    async with start() as server, server.client() as http, server.client(server.gateway_key) as gw:

        async def scope(client: httpx.AsyncClient, salt: str = "", **headers: str) -> str:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            body = BODY | ({"cache_salt": salt} if salt else {}) | {"user": "same"}
            assert (await client.post(CHAT, json=body, headers=named)).status_code == 200
            return server.engine.requests[-1].scope

        scopes = [
            await scope(http),
            await scope(http, "a"),
            await scope(http, "b"),
            await scope(http, "a", x_cache_salt="a"),
            await scope(gw),
            await scope(gw, x_kvkeep_subject="alice"),
            await scope(gw, x_kvkeep_subject="bob"),
            await scope(gw, x_kvkeep_tenant="a"),
            await scope(gw, x_kvkeep_tenant="b"),
            await scope(gw, x_kvkeep_tenant="a", x_kvkeep_subject="alice"),
        ]
        assert len(set(scopes)) == len(scopes)
        assert await scope(http) == scopes[0]
        assert await scope(http, x_cache_salt="a") == scopes[1]
        assert [r.tenant for r in server.engine.requests[4:10]] == [
            "gw", "gw", "gw", "gw/a", "gw/b", "gw/a",
        ]  # fmt: skip
