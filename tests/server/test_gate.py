"""What holds for every route: a key, ids, one log line, no content outside the answer."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from kvkeep.server.admin import create_admin_app
from kvkeep.server.app import create_app
from kvkeep.server.options import ServerOptions
from kvkeep.server.store import TenantStore
from tests.server.conftest import Start, wait_for
from tests.server.fakes import MODEL, ByteText, FakeEngine

CANARY = "c4n4ry-7f3a"
USER = {"role": "user", "content": "hi"}


def routes_of(app: Starlette) -> list[tuple[str, str]]:
    return [
        (route.path, method)
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


def apps() -> tuple[Starlette, Starlette]:
    app = create_app(FakeEngine(), ByteText(), TenantStore.local(), ServerOptions())
    return app, create_admin_app(app.state.frontend, "token")


async def test_no_route_of_either_port_answers_without_a_key(start: Start) -> None:
    public, admin = apps()
    walked = 0
    async with start() as server:
        for app, url in ((public, server.url), (admin, server.admin_url)):
            async with httpx.AsyncClient(base_url=url, verify=False) as http:
                for path, method in [*routes_of(app), ("/nowhere", "GET"), ("/", "PUT")]:
                    if url == server.url and path == "/health":
                        continue
                    for key in (None, "x", "wrong", "kvk_x_y_z"):
                        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                        headers["Content-Type"] = "application/json"
                        answer = await http.request(method, path, content=b"{}", headers=headers)
                        assert answer.status_code == 401, (path, method, key)
                        assert answer.headers["www-authenticate"] == "Bearer"
                        if method != "HEAD":
                            assert answer.json()["error"]["code"] == "invalid_api_key"
                        walked += 1
        assert server.engine.requests == []
    assert walked > 4 * 10


async def test_a_tenants_key_does_not_open_the_admin_port_nor_the_other_way(start: Start) -> None:
    async with start() as server, server.admin() as admin, server.client() as http:
        token = admin.headers["authorization"]
        key = http.headers["authorization"]
        assert (await admin.get("/metrics", headers={"Authorization": key})).status_code == 401
        assert (await http.get("/v1/models", headers={"Authorization": token})).status_code == 401
        for path in ("/metrics", "/ready", "/reload"):
            assert (await http.get(path)).status_code == 404


async def test_health_needs_no_key_and_says_nothing_else(start: Start) -> None:
    async with start() as server, httpx.AsyncClient(base_url=server.url, verify=False) as http:
        answer = await http.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("asked", "echoed"),
    [("abc-1.2:3_X", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("-a", False)],
)
async def test_a_request_id_comes_back_where_it_is_well_formed(
    start: Start, asked: str, echoed: bool
) -> None:
    async with start() as server, server.client() as http:
        for path in ("/v1/models", "/nowhere", "/health"):
            answer = await http.get(path, headers={"X-Request-Id": asked})
            assert (answer.headers["x-request-id"] == asked) == echoed
            assert len(answer.headers["x-kvkeep-request-id"]) == 32


async def test_a_request_id_tells_nothing_of_other_requests(start: Start) -> None:
    async with start() as server, server.client() as http:
        answers = [await http.get("/v1/models") for _ in range(16)]
    ids = [answer.headers["x-kvkeep-request-id"] for answer in answers]
    assert len({*ids}) == 16
    assert ids not in (sorted(ids), sorted(ids, reverse=True)), "they count nothing"
    assert len({one[:8] for one in ids}) == len({one[-8:] for one in ids}) == 16


async def test_one_log_line_per_request_says_who_and_how_long(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvkeep.request")
    engine = FakeEngine(cached_tokens=3, kv="k4v2")
    async with start(engine) as server, server.client() as http:
        body = {"model": MODEL, "messages": [USER], "max_tokens": 5, "user": "u"}
        answer = await http.post("/v1/chat/completions", json=body)
        await http.get("/nowhere")
        await wait_for(lambda: len(caplog.records) == 2)
    line, other = (json.loads(record.message) for record in caplog.records)
    assert line["id"] == answer.headers["x-kvkeep-request-id"]
    assert (line["tenant"], line["route"], line["method"]) == (
        "acme",
        "/v1/chat/completions",
        "POST",
    )
    assert (line["status"], line["finish"], line["error"]) == (200, "length", None)
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (21, 3, 5)
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert (line["ignored"], line["kv"]) == (["user"], "k4v2")
    assert (other["route"], other["status"], other["error"]) == ("unmatched", 404, None)
    assert other["kv"] is None


FIELDS = [
    "model",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "user",
    "metadata",
    "store",
    "tools",
    "tool_choice",
    "functions",
    "response_format",
    "logit_bias",
    "logprobs",
    "stream",
    "stream_options",
    "cache_salt",
    "suffix",
    "audio",
    "modalities",
    "prediction",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "reasoning_effort",
]
HEADERS = [
    "User-Agent",
    "X-Request-Id",
    "X-Cache-Salt",
    "X-Kvkeep-Subject",
    "X-Kvkeep-Tenant",
    "Accept",
    "Cookie",
    "Origin",
    "Referer",
    "OpenAI-Organization",
    "X-Forwarded-For",
    "Traceparent",
    "Authorization",
    "Content-Type",
]


async def test_a_canary_in_every_field_and_header_reaches_no_log_no_metric_and_no_error(
    start: Start, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = FakeEngine(
        fail_with=lambda r: ValueError(CANARY) if r.params.max_tokens == 7 else None
    )
    base = {"model": MODEL, "messages": [USER], "max_tokens": 5}
    errors, answered = "", 0
    async with start(engine) as server, server.client() as http:
        gateway = server.client(server.gateway_key)
        bodies = [
            base | {name: value} for name in FIELDS for value in (CANARY, [CANARY], {"x": CANARY})
        ]
        bodies += [base | {"messages": [{"role": "user", "content": f"tell me {CANARY}"}]}]
        bodies += [base | {"messages": [{"role": CANARY, "content": CANARY, "name": CANARY}]}]
        bodies += [base | {"max_tokens": 7}, base | {"max_tokens": 7, "stream": True}]
        answers = [await http.post("/v1/chat/completions", json=body) for body in bodies]
        answers += [
            await client.post("/tokenize", json={}, headers={name: CANARY})
            for name in HEADERS
            for client in (http, gateway)
        ]
        answers += [await http.get(f"/{CANARY}?{CANARY}"), await http.get(f"/v1/models/{CANARY}")]
        answers += [await http.request(CANARY.upper(), "/health")]
        answers += [await http.post("/tokenize", content=f'{{"{CANARY}'.encode())]
        for answer in answers:
            answered += answer.status_code == 200
            errors += answer.text if answer.status_code != 200 else ""
        async with server.admin() as admin:
            shown = (await admin.get("/metrics")).text + (await admin.get("/ready")).text
        await gateway.aclose()
    assert answered > 10
    logged = "".join(r.getMessage() + str(r.exc_info) for r in caplog.records if _ours(r))
    assert "internal_error" in logged
    assert "ValueError" in logged
    captured = capfd.readouterr()
    for text in (logged, shown, errors, captured.out, captured.err):
        assert CANARY not in text.lower()


def _ours(record: logging.LogRecord) -> bool:
    """Leave out what the test's own client logs."""
    return not record.name.startswith(("httpx", "httpcore"))
