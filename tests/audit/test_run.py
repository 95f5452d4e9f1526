from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest

from kvkeep.audit import Options, Report, audit
from kvkeep.audit.prober import Clock
from kvkeep.errors import AuditError, ConfigError
from tests.audit.fakes import CAST, MODEL, URL, FakeServer, text_of

BASE = Options(
    URL,
    CAST,
    channels=("ttft",),
    margin=0.2,
    seconds=1e6,
    per_second=1e6,
    prompt_tokens=128,
    max_prompt_tokens=128,
    seed=5,
)


async def seen(server: FakeServer, options: Options = BASE) -> Report:
    return await audit(options, transport=server.transport(), clock=server.time.clock())


async def test_without_a_cache_the_audit_is_void_and_never_clean() -> None:
    report = await seen(FakeServer(caches=False))
    assert report.verdict == "void"
    assert report.exit_code == 4
    assert [finding.outcome for finding in report.controls] == ["void"]
    assert "own hits do not show" in report.channels[0].reason
    assert report.channels[0].evidence is None


async def test_noise_that_hides_own_hits_voids_the_audit() -> None:
    report = await seen(FakeServer(noise_ms=500.0, leaks=frozenset({"ttft"})))
    assert report.verdict == "void"


async def test_prompts_grow_until_own_hits_are_clear() -> None:
    long = replace(BASE, max_prompt_tokens=1024)
    quiet = await seen(FakeServer(), long)
    noisy = await seen(FakeServer(noise_ms=4.0), long)
    assert quiet.prompt_tokens == 128
    assert noisy.prompt_tokens > 128
    assert noisy.verdict == "clean"


async def test_a_public_text_of_many_tokens_shortens_no_prompt() -> None:
    """Else a secret part would be too short to show, and the audit blind."""
    server = FakeServer()
    behind = "x" * 300
    await seen(server, replace(BASE, behind=behind))
    texts = [text_of(body) for body in server.bodies if behind in text_of(body)]
    assert texts
    assert {len(text.removeprefix(behind).split()) for text in texts} == {128}


async def test_a_verdict_that_time_does_not_allow_is_void() -> None:
    report = await seen(FakeServer(), replace(BASE, seconds=1.0, margin=0.01))
    assert report.verdict == "void"
    assert "raise --seconds" in report.channels[0].reason
    assert report.seconds < 2.0


async def test_a_long_audit_says_now_and_then_how_far_it_is() -> None:
    server, notes = FakeServer(saved_ms=10.0), list[str]()
    options = replace(BASE, seconds=200.0, margin=0.01)
    clock = server.time.clock()
    await audit(options, transport=server.transport(), clock=clock, note=notes.append)
    told = [note for note in notes if note.endswith("channels are done")]
    times = [float(note.split(" s of 200 at most")[0]) for note in told]
    assert 4 <= len(times) <= 7
    assert all(later - earlier >= 30 for earlier, later in pairwise(times))


async def test_channels_without_time_say_so() -> None:
    report = await seen(FakeServer(), replace(BASE, seconds=0.1, margin=0.01, batch=32))
    assert report.channels[0].reason == "no time was left; raise --seconds"


async def test_a_verdict_waits_for_the_pairs_asked_for() -> None:
    server = FakeServer(leaks=frozenset({"ttft"}))
    report = await seen(server, replace(BASE, least_pairs=64))
    evidence = report.channels[0].evidence
    assert evidence is not None
    assert evidence.pairs == 64
    assert report.verdict == "leak"


async def test_prompts_of_unequal_counts_void_the_audit() -> None:
    report = await seen(FakeServer(uneven=True))
    assert report.verdict == "void"
    assert "counts the tokens of like prompts differently" in report.channels[0].reason
    assert report.unequal_pairs > 0


async def test_answers_are_as_long_as_they_shall_be() -> None:
    server = FakeServer()
    await seen(server, replace(BASE, answer_tokens=3))
    assert {body["max_tokens"] for body in server.bodies} == {3}


async def test_the_wait_lies_between_the_victim_and_the_attacker() -> None:
    server = FakeServer()
    report = await seen(server, replace(BASE, settle_s=60.0, batch=64))
    assert 60 <= report.seconds < 70
    assert report.verdict == "clean"


async def test_channels_wait_at_the_same_time() -> None:
    waiting, together = 0, asyncio.Event()
    server = FakeServer()

    async def sleep(seconds: float) -> None:
        nonlocal waiting
        if seconds == 60.0:
            waiting += 1
            if waiting == 3:
                together.set()
            async with asyncio.timeout(30.0):
                await together.wait()
            waiting -= 1

    options = replace(BASE, settle_s=60.0, batch=40, channels=("ttft", "boundary", "sentinel"))
    clock = Clock(server.time.now, sleep)
    report = await audit(options, transport=server.transport(), clock=clock)
    assert together.is_set()
    assert report.verdict == "clean"


async def test_a_target_that_dies_ends_the_audit() -> None:
    server = FakeServer()
    living = server.transport()

    async def dying(request: httpx.Request) -> httpx.Response:
        if len(server.bodies) > 100:
            raise httpx.ReadError("reset")
        return await living.handle_async_request(request)

    with pytest.raises(AuditError, match="ReadError"):
        await audit(BASE, transport=httpx.MockTransport(dying), clock=server.time.clock())


async def test_a_seed_repeats_the_prompts_and_none_is_sent_to_be_cold_twice() -> None:
    one, other = FakeServer(), FakeServer()
    await seen(one)
    await seen(other)
    assert [body["prompt"] for body in one.bodies] == [body["prompt"] for body in other.bodies]
    counts: dict[str, int] = {}
    for body in one.bodies:
        counts[body["prompt"]] = counts.get(body["prompt"], 0) + 1
    assert set(counts.values()) == {1, 2}


async def test_without_a_seed_runs_differ() -> None:
    one, other = FakeServer(), FakeServer()
    first = await seen(one, replace(BASE, seed=None))
    second = await seen(other, replace(BASE, seed=None))
    assert first.seed != second.seed
    assert one.bodies[0] != other.bodies[0]


async def test_every_channel_at_once_tells_the_leaking_one() -> None:
    server = FakeServer(leaks=frozenset({"spoofed_fields"}))
    report = await seen(server, replace(BASE, channels=(), margin=0.25))
    assert report.verdict == "leak"
    leaking = [f.facts.name for f in report.channels if f.outcome == "leak"]
    assert leaking == ["spoofed_fields"]
    assert report.reason.startswith("spoofed_fields told")
    assert report.worst is not None
    assert report.worst.facts.name == "spoofed_fields"
    assert report.model == MODEL


async def test_a_bad_key_ends_the_audit() -> None:
    stranger = replace(CAST, victim=replace(CAST.victim, key="unknown"))
    with pytest.raises(Exception, match="refuses victim with 401") as refused:
        await seen(FakeServer(), replace(BASE, cast=stranger, model=MODEL))
    assert "unknown" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"channels": ("ttft", "nope")}, "channels"),
        ({"alpha": 0.0}, "alpha"),
        ({"margin": 0.5}, "margin"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": math.nan}, "seconds"),
        ({"per_second": math.inf}, "rate"),
        ({"settle_s": -1.0}, "settle"),
        ({"prompt_tokens": 8}, "prompt_tokens"),
        ({"prompt_tokens": 999}, "prompt_tokens"),
        ({"batch": 0}, "batch"),
        ({"answer_tokens": 0}, "answer_tokens"),
    ],
)
def test_options_out_of_range_name_their_field(change: Mapping[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        replace(BASE, **change)
