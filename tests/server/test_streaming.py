"""How streams begin, keep quiet, and end: well, by their client, by an error."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvkeep.engine.api import FinishReason, GenerateRequest
from kvkeep.errors import EngineStopped, PoolExhausted
from kvkeep.server.options import ServerOptions
from tests.server.conftest import Running, Start, wait_for
from tests.server.fakes import MODEL, REPLY, FakeEngine

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 13}
STREAM = BODY | {"stream": True}
CHAT = "/v1/chat/completions"
FAST_POLL = ServerOptions(poll_s=0.05, drain_s=0.2)


def data_of(text: str) -> list[str]:
    return [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]


async def test_a_transcript_has_the_right_frames_and_headers(start: Start) -> None:
    async with start(FakeEngine(reply="Hi")) as server, server.client() as http:
        answer = await http.post(CHAT, json=STREAM | {"stream_options": {"include_usage": True}})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.text.endswith("\n\n")
        frames = data_of(answer.text)
        assert frames.pop() == "[DONE]"
        events = [json.loads(frame) for frame in frames]
        request_id = answer.headers["x-request-id"]
        assert {e["id"] for e in events} == {f"chatcmpl-{request_id}"}
        assert {e["object"] for e in events} == {"chat.completion.chunk"}
        choices = [e["choices"][0] for e in events[:-1]]
        assert [c["delta"] for c in choices] == [
            {"role": "assistant", "content": ""},
            {"content": "H"},
            {"content": "i"},
            {},
        ]
        assert [c["finish_reason"] for c in choices] == [None, None, None, "stop"]
        assert [e["usage"] for e in events[:-1]] == [None] * 4
        assert events[-1]["choices"] == []


async def test_a_character_is_never_broken(start: Start) -> None:
    async with start(FakeEngine(reply="ö€😀")) as server, server.client() as http:
        answer = await http.post(CHAT, json=STREAM)
        deltas = [json.loads(f)["choices"][0]["delta"] for f in data_of(answer.text)[:-1]]
        assert [d["content"] for d in deltas if d.get("content")] == ["ö", "€", "😀"]


async def test_silence_is_filled_with_comments(start: Start) -> None:
    options = ServerOptions(keepalive_s=0.05, drain_s=0.2)
    engine = FakeEngine(reply="ab", first_delay_s=0.2, delay_s=0.12)
    async with start(engine, options) as server, server.client() as http:
        answer = await http.post(CHAT, json=STREAM)
        assert answer.text.startswith(": keep-alive\n\n: keep-alive\n\n")
        between = answer.text.partition('"a"')[2].partition('"b"')[0]
        assert ": keep-alive\n\n" in between
        assert "".join(c for c in _contents(answer.text)) == "ab"


async def test_tokens_without_text_are_silence_too(start: Start) -> None:
    options = ServerOptions(keepalive_s=0.1, drain_s=0.2)
    async with (
        start(FakeEngine(mute=True, delay_s=0.03), options) as server,
        server.client() as http,
    ):
        answer = await http.post(CHAT, json=STREAM)
        assert answer.text.count(": keep-alive\n\n") >= 2


async def test_what_comes_is_sent_at_once(start: Start) -> None:
    """The first event must arrive while the engine still sleeps before its second token."""
    async with (
        start(FakeEngine(delay_s=0.4)) as server,
        server.client() as http,
        http.stream("POST", CHAT, json=STREAM) as answer,
    ):
        seen = ""
        async for part in answer.aiter_text():
            seen += part
            if '"H"' in seen:
                break
        assert len(server.engine.live) == 1
        assert '"e"' not in seen


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_its_request(start: Start, stream: bool) -> None:
    async with start(FakeEngine(delay_s=0.05)) as server:
        async with server.client() as http:
            task = asyncio.create_task(http.post(CHAT, json=BODY | {"stream": stream}))
            await wait_for(lambda: server.engine.live)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await wait_for(lambda: not server.engine.live, timeout_s=0.3)
        assert len(server.engine.closed) == 1
        await wait_for(lambda: _counted(server, "client_disconnects_total 1.0"))


async def test_a_client_that_leaves_stops_all_of_its_batch(start: Start) -> None:
    async with start(FakeEngine(delay_s=0.05)) as server:
        async with server.client() as http:
            body = {"model": MODEL, "prompt": ["a", "b", "c"], "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                await anext(answer.aiter_bytes())
                assert len(server.engine.live) == 3
        await wait_for(lambda: not server.engine.live, timeout_s=0.3)
        assert len(server.engine.closed) == 3


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineStopped("it died of s3cr3t"), 503, "service_unavailable"),
        (PoolExhausted("s3cr3t"), 429, "rate_limit_exceeded"),
        (ValueError("s3cr3t"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_a_status(
    start: Start, error: Exception, status: int, code: str, stream: bool
) -> None:
    async with start(FakeEngine(fail_with=lambda _: error)) as server, server.client() as http:
        answer = await http.post(CHAT, json=BODY | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert "s3cr3t" not in answer.text
        assert ("retry-after" in answer.headers) == (status in (429, 503))


async def test_an_error_after_the_first_token_ends_the_stream_with_it(start: Start) -> None:
    engine = FakeEngine(fail_with=lambda _: ValueError("s3cr3t"), fail_after=3, delay_s=0.02)
    async with start(engine) as server, server.client() as http:
        answer = await http.post(CHAT, json=STREAM)
        assert answer.status_code == 200
        frames = data_of(answer.text)
        assert json.loads(frames[-1])["error"]["code"] == "internal_error"
        assert "".join(_contents(answer.text)) == REPLY[:3]
        assert "[DONE]" not in answer.text
        assert "s3cr3t" not in answer.text


@pytest.mark.parametrize(
    ("finish", "status"),
    [(FinishReason.ERROR, 500), (FinishReason.DEADLINE, 504), (FinishReason.CANCELLED, 503)],
)
async def test_a_sequence_that_ends_badly_is_an_error(
    start: Start, finish: FinishReason, status: int
) -> None:
    async with start(FakeEngine(finish=finish)) as server, server.client() as http:
        assert (await http.post(CHAT, json=BODY)).status_code == status
        error = json.loads(data_of((await http.post(CHAT, json=STREAM)).text)[-1])["error"]
        assert error["type"] == "server_error"


async def test_one_prompt_that_fails_stops_the_others_of_its_batch(start: Start) -> None:
    def fails(request: GenerateRequest) -> Exception | None:
        return PoolExhausted("full") if request.prompt_ids[-1] == ord("b") else None

    engine = FakeEngine(fail_with=fails, fail_after=1, delay_s=0.05)
    async with start(engine) as server, server.client() as http:
        body = {"model": MODEL, "prompt": ["a", "b", "c"]}
        assert (await http.post("/v1/completions", json=body)).status_code == 429
        assert len(engine.closed) == 3


async def test_the_engines_death_ends_every_client_and_refuses_new_ones(start: Start) -> None:
    """Even where the engine's own iterators never say a word again."""
    engine = FakeEngine(first_delay_s=60)
    async with start(engine, FAST_POLL) as server, server.client() as http:
        tasks = [
            asyncio.create_task(http.post(CHAT, json=BODY | {"stream": bool(i % 2)}))
            for i in range(6)
        ]
        await wait_for(lambda: len(engine.live) == 6)
        engine.dead = True
        answers = await asyncio.wait_for(asyncio.gather(*tasks), 3)
        assert [a.status_code for a in answers] == [503] * 6
        assert (await http.post(CHAT, json=BODY)).status_code == 503
        assert (await http.get("/health")).status_code == 503
        async with server.admin() as admin:
            ready = await admin.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "dead")
            assert "kvkeep:engine_up 0.0" in (await admin.get("/metrics")).text


async def test_a_storm_of_leaving_clients_leaves_nothing_behind(start: Start) -> None:
    async with start(FakeEngine(delay_s=0.01)) as server, server.client() as http:

        async def one(i: int) -> None:
            async with http.stream("POST", CHAT, json=STREAM) as answer:
                assert answer.status_code == 200
                async for _ in answer.aiter_lines():
                    if i % 3 == 0:
                        return

        await asyncio.gather(*(one(i) for i in range(60)))
        await wait_for(lambda: not server.engine.live)
        async with server.admin() as admin:
            assert (await admin.get("/ready")).json()["in_flight"] == 0


def _contents(text: str) -> list[str]:
    events = [json.loads(f) for f in data_of(text) if f != "[DONE]"]
    deltas = [e["choices"][0]["delta"] for e in events if e.get("choices")]
    return [d["content"] for d in deltas if "content" in d]


async def _counted(server: Running, sample: str) -> bool:
    async with server.admin() as admin:
        return f"kvkeep:{sample}" in (await admin.get("/metrics")).text
