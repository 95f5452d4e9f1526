from __future__ import annotations

import httpx
import pytest

from kvkeep.audit.prober import Prober, Prompt, Refused, first_model
from kvkeep.audit.target import base_url, new_client
from kvkeep.errors import AuditError
from tests.audit.fakes import ATTACKER, MODEL, NAMES, URL, VICTIM, FakeServer

WORDS = " ".join(f"w{i}" for i in range(64))


def prober(server: FakeServer, per_second: float = 1e6) -> Prober:
    client = new_client(base_url(URL), server.transport())
    return Prober(client, MODEL, per_second=per_second, clock=server.time.clock())


def answering(status: int, content: str = "") -> Prober:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=content))
    client = new_client(base_url(URL), transport)
    return Prober(client, MODEL, per_second=1e6, clock=FakeServer().time.clock())


async def test_a_reply_has_its_time_and_its_counts() -> None:
    server = FakeServer()
    asking = prober(server)
    cold = await asking.ask(ATTACKER, Prompt(WORDS))
    warm = await asking.ask(ATTACKER, Prompt(WORDS))
    assert (cold.prompt_tokens, cold.cached_tokens, warm.cached_tokens) == (64, 0, 64)
    assert cold.seconds > 2.28e-3
    assert warm.seconds > 1e-3
    assert server.bodies[0] == {
        "model": MODEL,
        "prompt": WORDS,
        "max_tokens": 1,
        "temperature": 0,
    }


async def test_requests_keep_to_the_rate() -> None:
    server = FakeServer()
    asking, begun = prober(server, per_second=4.0), server.time.now()
    for _ in range(5):
        await asking.ask(ATTACKER, Prompt(WORDS))
    await asking.burst(ATTACKER, [Prompt(WORDS)] * 4)
    await asking.ask(ATTACKER, Prompt(WORDS))
    assert 2.25 <= server.time.now() - begun <= 2.3
    assert asking.requests == 10


async def test_a_busy_target_is_asked_again_and_the_wait_is_not_timed() -> None:
    server = FakeServer(busy=2)
    begun = server.time.now()
    reply = await prober(server).ask(ATTACKER, Prompt(WORDS))
    assert reply.seconds < 0.1
    assert server.time.now() - begun > 4.0


async def test_a_target_that_stays_busy_is_an_error() -> None:
    with pytest.raises(Refused, match="lower --rate"):
        await prober(FakeServer(busy=99)).ask(ATTACKER, Prompt(WORDS))


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "^key: "), (403, "^key: "), (404, "^model: "), (400, "^url: "), (500, "^url: ")],
)
async def test_refusals_name_the_remedy_and_no_key(status: int, says: str) -> None:
    with pytest.raises(Refused, match=says) as refused:
        await answering(status, f"bad key {ATTACKER.key}").ask(ATTACKER, Prompt(WORDS))
    assert refused.value.status == status
    assert ATTACKER.key not in str(refused.value)


@pytest.mark.parametrize("content", ["<html>", "[]", '{"object": "list"}'])
async def test_what_is_not_openai_is_an_error(content: str) -> None:
    with pytest.raises(AuditError, match="not OpenAI's"):
        await answering(200, content).ask(ATTACKER, Prompt(WORDS))


async def test_usage_may_be_missing() -> None:
    reply = await answering(200, '{"choices": [], "usage": null}').ask(ATTACKER, Prompt(WORDS))
    assert reply.prompt_tokens is None
    assert reply.cached_tokens is None


async def test_a_target_that_only_chats_is_chatted_with() -> None:
    server = FakeServer(chat_only=True)
    asking = prober(server)
    await asking.choose_endpoint(ATTACKER, WORDS)
    await asking.ask(ATTACKER, Prompt(WORDS))
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": WORDS}]


async def test_accepting_is_told_from_failing() -> None:
    assert await prober(FakeServer()).accepts(VICTIM, Prompt(WORDS))
    assert not await answering(400).accepts(VICTIM, Prompt(WORDS))
    with pytest.raises(Refused):
        await answering(500).accepts(VICTIM, Prompt(WORDS))


async def test_a_burst_is_ranked_by_who_was_answered_first() -> None:
    server = FakeServer()
    asking = prober(server)
    known = Prompt(WORDS)
    await asking.ask(ATTACKER, known)
    fresh = [Prompt(f"x{i} {WORDS}") for i in range(3)]
    replies = await asking.burst(ATTACKER, [*fresh, known])
    assert [reply.rank for reply in replies] == [1, 2, 3, 0]


async def test_keys_travel_in_their_header_alone() -> None:
    server = FakeServer()
    await prober(server).ask(VICTIM, Prompt(WORDS, headers=(("X-A", "b"),), fields=(("u", "v"),)))
    (headers,), (body,) = server.seen_headers, server.bodies
    assert NAMES[headers.pop("authorization")] == "victim"
    assert headers["x-a"] == "b"
    assert body["u"] == "v"
    assert VICTIM.key not in str(headers) + str(body)


async def test_the_first_model_is_asked_for() -> None:
    async with new_client(base_url(URL), FakeServer().transport()) as client:
        assert await first_model(client, ATTACKER) == MODEL
    empty = httpx.MockTransport(lambda _: httpx.Response(200, json={"data": []}))
    async with new_client(base_url(URL), empty) as client:
        with pytest.raises(AuditError, match="name one with --model"):
            await first_model(client, ATTACKER)
    refusing = httpx.MockTransport(lambda _: httpx.Response(401))
    async with new_client(base_url(URL), refusing) as client:
        with pytest.raises(Refused, match="attacker"):
            await first_model(client, ATTACKER)


async def test_a_target_that_hangs_up_is_an_error() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset")

    client = new_client(base_url(URL), httpx.MockTransport(gone))
    asking = Prober(client, MODEL, per_second=1e6, clock=FakeServer().time.clock())
    with pytest.raises(AuditError, match="ReadError"):
        await asking.ask(ATTACKER, Prompt(WORDS))
    with pytest.raises(AuditError, match="no server"):
        await first_model(client, ATTACKER)
