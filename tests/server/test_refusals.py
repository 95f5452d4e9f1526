"""Bad requests of every kind: a 4xx that names the field and never repeats its value."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from kvkeep.errors import ConfigError
from kvkeep.server.options import ServerLimits, ServerOptions
from tests.server.conftest import Start
from tests.server.fakes import MAX_LEN, MODEL, FakeEngine

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
SECRET = "s3cr3t-v4lu3"
USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"model": MODEL, "messages": [USER]} | fields).encode()


def complete(**fields: Any) -> tuple[str, bytes]:
    return COMPLETE, json.dumps({"model": MODEL, "prompt": "hi"} | fields).encode()


def message(**fields: Any) -> tuple[str, bytes]:
    return chat(messages=[USER | fields])


def raw(body: bytes) -> tuple[str, bytes]:
    return CHAT, body


BAD: dict[str, tuple[tuple[str, bytes], str]] = {
    "no body": (raw(b""), "body"),
    "not JSON": (raw(b'{"model": s3cr3t-v4lu3'), "body"),
    "an array": (raw(b"[1]"), "body"),
    "invalid UTF-8": (raw(b'{"model": "\xff"}'), "body"),
    "lone surrogate": (raw(b'{"model": "\\ud800"}'), "body"),
    "lone surrogate in a name": (raw(b'{"\\udc00": 1}'), "body"),
    "duplicate field": (raw(b'{"model": "a", "model": "b"}'), "body"),
    "NaN": (raw(b'{"model": "tiny", "temperature": NaN}'), "body"),
    "Infinity": (raw(b'{"model": "tiny", "temperature": -Infinity}'), "body"),
    "endless integer": (raw(b'{"seed": ' + b"9" * 5000 + b"}"), "body"),
    "infinite float": (
        raw(b'{"model": "tiny", "temperature": 1e999}'),
        "temperature",
    ),
    "deep nesting": (raw(b'{"messages": ' + b"[" * 3000 + b"]" * 3000 + b"}"), "body"),
    "deep objects": (raw(b'{"a":' * 3000 + b"1" + b"}" * 3000), "body"),
    "unbalanced": (raw(b'{"a": ]]]]'), "body"),
    "giant body": (raw(b'{"model": "' + b"a" * 70_000 + b'"}'), "body"),
    "no model": (raw(b'{"messages": [{"role": "user", "content": "x"}]}'), "model"),
    "null model": (chat(model=None), "model"),
    "unknown model": (chat(model=SECRET), "model"),
    "no messages": (raw(b'{"model": "tiny"}'), "messages"),
    "empty messages": (chat(messages=[]), "messages"),
    "messages a string": (chat(messages=SECRET), "messages"),
    "message a string": (chat(messages=[SECRET]), "messages[0]"),
    "message without role": (chat(messages=[{"content": SECRET}]), "messages[0].role"),
    "wrong role": (message(role=SECRET), "messages[0].role"),
    "tool role": (message(role="tool", content=SECRET), "messages[0].role"),
    "no content": (message(content=None), "messages[0].content"),
    "content a number": (message(content=3), "messages[0].content"),
    "image part": (
        message(content=[{"type": "image_url", "image_url": {"url": SECRET}}]),
        "messages[0].content[0].image_url",
    ),
    "unknown part": (
        message(content=[{"type": SECRET, "text": "x"}]),
        "messages[0].content[0].type",
    ),
    "part without text": (message(content=[{"type": "text"}]), "messages[0].content[0].text"),
    "unknown message field": (message(mood=SECRET), "messages[0].mood"),
    "tool calls": (
        message(role="assistant", tool_calls=[{"id": SECRET}]),
        "messages[0].tool_calls",
    ),
    "template refuses": (message(content="refuse me"), "messages"),
    "long prompt": (message(content="x" * MAX_LEN), "messages"),
    "too many characters": (message(content="x" * 20_001), "messages"),
    "tools": (chat(tools=[{"type": "function", "function": {"name": SECRET}}]), "tools"),
    "tool choice": (chat(tool_choice="auto"), "tool_choice"),
    "functions": (chat(functions=[{"name": SECRET}]), "functions"),
    "JSON mode": (chat(response_format={"type": "json_object"}), "response_format"),
    "audio": (chat(audio={"voice": SECRET}), "audio"),
    "modalities": (chat(modalities=["text", "audio"]), "modalities"),
    "reasoning": (chat(reasoning_effort="high"), "reasoning_effort"),
    "search": (chat(web_search_options={}), "web_search_options"),
    "unknown field": (chat(temperatur=SECRET), "temperatur"),
    "temperature a string": (chat(temperature=SECRET), "temperature"),
    "temperature too high": (chat(temperature=2.5), "temperature"),
    "temperature negative": (chat(temperature=-0.5), "temperature"),
    "temperature huge": (raw(b'{"model":"tiny","temperature":1' + b"0" * 19 + b"}"), "temperature"),
    "top_p zero": (chat(top_p=0), "top_p"),
    "top_p above one": (chat(top_p=1.5), "top_p"),
    "top_k negative": (chat(top_k=-2), "top_k"),
    "min_p above one": (chat(min_p=1.5), "min_p"),
    "n zero": (chat(n=0), "n"),
    "n negative": (chat(n=-1), "n"),
    "n huge": (chat(n=10**6), "n"),
    "n a bool": (chat(n=True), "n"),
    "max_tokens zero": (chat(max_tokens=0), "max_tokens"),
    "max_tokens negative": (chat(max_tokens=-5), "max_tokens"),
    "max_tokens a float": (chat(max_tokens=1.5), "max_tokens"),
    "max_tokens too many": (chat(max_tokens=MAX_LEN), "max_tokens"),
    "max_completion_tokens zero": (chat(max_completion_tokens=0), "max_completion_tokens"),
    "contradiction": (chat(max_tokens=3, max_completion_tokens=4), "max_tokens"),
    "min_tokens above max": (chat(max_tokens=3, min_tokens=4), "min_tokens"),
    "seed negative": (chat(seed=-1), "seed"),
    "seed too large": (chat(seed=2**63), "seed"),
    "stop a number": (chat(stop=5), "stop"),
    "stop empty": (chat(stop=""), "stop"),
    "stop too long": (chat(stop=[SECRET * 100]), "stop"),
    "stops too many": (chat(stop=["a"] * 17), "stop"),
    "stop id too large": (chat(stop_token_ids=[10**6]), "stop_token_ids"),
    "stop ids too many": (chat(stop_token_ids=[1] * 65), "stop_token_ids"),
    "presence penalty": (chat(presence_penalty=3), "presence_penalty"),
    "repetition penalty": (chat(repetition_penalty=0), "repetition_penalty"),
    "logit bias a list": (chat(logit_bias=[1]), "logit_bias"),
    "logit bias no id": (chat(logit_bias={SECRET: 1}), "logit_bias"),
    "logit bias out of range": (chat(logit_bias={"5": 101}), "logit_bias[...]"),
    "logit bias unknown id": (chat(logit_bias={"99999": 1}), "logit_bias"),
    "logit bias twice": (chat(logit_bias={"5": 1, "05": 2}), "logit_bias"),
    "logit bias too large": (
        chat(logit_bias=dict.fromkeys(map(str, range(1025)), 1)),
        "logit_bias",
    ),
    "top_logprobs alone": (chat(top_logprobs=2), "top_logprobs"),
    "top_logprobs too many": (chat(logprobs=True, top_logprobs=21), "logprobs"),
    "stream a string": (chat(stream=SECRET), "stream"),
    "stream options alone": (chat(stream_options={"include_usage": True}), "stream_options"),
    "unknown stream option": (
        chat(stream=True, stream_options={"mood": SECRET}),
        "stream_options.mood",
    ),
    "salt a number": (chat(cache_salt=5), "cache_salt"),
    "salt null": (chat(cache_salt=None), "cache_salt"),
    "salt empty": (chat(cache_salt=""), "cache_salt"),
    "salt with a space": (chat(cache_salt=f"{SECRET} "), "cache_salt"),
    "salt too long": (chat(cache_salt="a" * 257), "cache_salt"),
    "empty batch": (complete(prompt=[]), "prompt"),
    "empty ids": (complete(prompt=[[]]), "prompt"),
    "mixed batch": (complete(prompt=["a", [1]]), "prompt"),
    "mixed ids": (complete(prompt=[1, "a"]), "prompt"),
    "id out of range": (complete(prompt=[1, 10**6]), "prompt"),
    "id negative": (complete(prompt=[[1, -1]]), "prompt[0][1]"),
    "prompt a number": (complete(prompt=5), "prompt"),
    "prompt null": (complete(prompt=None), "prompt"),
    "prompt too long": (complete(prompt=[1] * MAX_LEN), "prompt"),
    "batch too large": (complete(prompt=["a"] * 257), "prompt"),
    "sequences too many": (complete(prompt=["a"] * 20, n=16), "n"),
    "no tokens without echo": (complete(max_tokens=0), "max_tokens"),
    "logprobs too many": (complete(logprobs=21), "logprobs"),
    "logprobs a bool": (complete(logprobs=True), "logprobs"),
    "best_of below n": (complete(n=3, best_of=2), "best_of"),
    "best_of too large": (complete(best_of=17), "best_of"),
    "best_of of a batch too large": (complete(prompt=["a"] * 20, best_of=16), "best_of"),
    "best_of streamed": (complete(best_of=2, stream=True), "best_of"),
    "best_of zero": (chat(best_of=0), "best_of"),
    "beams streamed": (chat(use_beam_search=True, stream=True), "use_beam_search"),
    "beams a string": (complete(use_beam_search=SECRET), "use_beam_search"),
    "beams with a temperature": (complete(use_beam_search=True, temperature=0.7), "temperature"),
    "beams with top_p": (chat(use_beam_search=True, top_p=0.5), "top_p"),
    "beams with top_k": (chat(use_beam_search=True, top_k=5), "top_k"),
    "beams with min_p": (chat(use_beam_search=True, min_p=0.5), "min_p"),
    "beams with a penalty": (
        chat(use_beam_search=True, presence_penalty=1),
        "presence_penalty",
    ),
    "beams with a bias": (chat(use_beam_search=True, logit_bias={"5": 1}), "logit_bias"),
    "beams with stops": (chat(use_beam_search=True, stop=[SECRET]), "stop"),
    "beams too many": (chat(use_beam_search=True, n=17), "n"),
    "early stopping": (chat(use_beam_search=True, early_stopping=True), "early_stopping"),
    "length penalty alone": (chat(length_penalty=0.5), "length_penalty"),
    "length penalty too large": (
        complete(use_beam_search=True, length_penalty=99),
        "length_penalty",
    ),
    "suffix": (complete(suffix=SECRET), "suffix"),
    "echo of a chat": (chat(echo=True), "echo"),
    "tokenize nothing": (("/tokenize", b"{}"), "prompt"),
    "tokenize both": (
        ("/tokenize", json.dumps({"prompt": "a", "messages": [USER]}).encode()),
        "prompt",
    ),
    "detokenize unknown ids": (("/detokenize", b'{"tokens": [99999]}'), "tokens"),
    "detokenize text": (("/detokenize", b'{"tokens": "s3cr3t-v4lu3"}'), "tokens"),
}
LIMITS = ServerLimits(max_body_bytes=65_536, max_prompt_chars=20_000)


async def test_every_bad_request_is_a_4xx_naming_its_field_and_not_its_value(start: Start) -> None:
    engine, problems = FakeEngine(), []
    async with start(engine, ServerOptions(limits=LIMITS)) as server, server.client() as http:
        for name, ((path, body), param) in BAD.items():
            headers = {"Content-Type": "application/json"}
            answer = await http.post(path, content=body, headers=headers)
            error = answer.json()["error"]
            named = error["param"] == param and error["message"].startswith(param)
            if not (400 <= answer.status_code < 500 and named) or SECRET in answer.text:
                problems.append((name, answer.status_code, error))
            assert set(error) == {"message", "type", "param", "code"}, name
    assert not problems, problems
    assert engine.requests == []


async def test_paths_methods_and_types_are_refused_in_the_same_shape(start: Start) -> None:
    async with start() as server, server.client() as http:
        answers = {
            404: await http.get(f"/v1/{SECRET}"),
            405: await http.get(CHAT),
            415: await http.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert SECRET not in answer.text
            assert answer.headers["content-type"] == "application/json"
        assert answers[405].headers["allow"] == "POST"


async def test_a_body_without_a_length_is_cut_off_at_the_cap(start: Start) -> None:
    """The server must stop reading, not collect what comes: the sender is told while it sends."""
    async with start(options=ServerOptions(limits=LIMITS)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n".encode())
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        writer.write(b"20000\r\n" + b" " * 0x20000 + b"\r\n")
        await writer.drain()
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()


async def test_a_body_that_never_comes_is_given_up(start: Start) -> None:
    options = ServerOptions(limits=ServerLimits(max_body_wait_s=0.2))
    async with start(options=options) as server:
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode())
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()


async def test_more_requests_at_a_time_than_the_cap_are_429_with_a_constant_wait(
    start: Start,
) -> None:
    async with start(FakeEngine(delay_s=0.05)) as server:
        key = server.file.add("small", share=0.1, concurrency=2)
        async with server.admin() as admin:
            await admin.post("/reload")
        async with server.client(key.text) as http, server.client() as other:
            path, body = chat()
            headers = {"Content-Type": "application/json"}
            answers = await asyncio.gather(
                *(http.post(path, content=body, headers=headers) for _ in range(6)),
                other.post(path, content=body, headers=headers),
            )
            assert sorted(a.status_code for a in answers[:6]) == [200] * 2 + [429] * 4
            assert answers[6].status_code == 200
            refused = next(a for a in answers if a.status_code == 429)
            assert refused.headers["retry-after"] == "1"
            assert (await http.post(path, content=body, headers=headers)).status_code == 200


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_must_be_above_zero(value: int) -> None:
    with pytest.raises(ConfigError, match="max_n"):
        ServerLimits(max_n=value)
