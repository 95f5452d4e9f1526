"""Each channel against a server that leaks there and nowhere else, and against one that doesn't."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvkeep.audit import Finding, Options, Report, audit
from kvkeep.audit.channel import Pair
from kvkeep.audit.channels import CHANNELS
from kvkeep.audit.channels.early_bird import recovery
from tests.audit.fakes import CAST, URL, FakeServer

TIMED_BY_PLAIN_PROMPTS = {"ttft", "early_bird"}
MARGIN = 0.15


def options(*channels: str) -> Options:
    return Options(
        URL,
        CAST,
        channels=channels,
        margin=MARGIN,
        seconds=1e6,
        per_second=1e6,
        seed=3,
        prompt_tokens=128,
        max_prompt_tokens=128,
    )


async def seen(server: FakeServer, *channels: str) -> Report:
    return await audit(options(*channels), transport=server.transport(), clock=server.time.clock())


def leaking(channel: str) -> FakeServer:
    """Return the server that leaks in this channel."""
    leak = "ttft" if channel in TIMED_BY_PLAIN_PROMPTS else channel
    small = 100 if channel == "eviction" else 1 << 20
    return FakeServer(
        leaks=frozenset({leak}), keys_needed=channel != "no_key", capacity_pages=small
    )


def tight(channel: str) -> FakeServer:
    """Return the same server without the leak."""
    return replace(leaking(channel), leaks=frozenset())


def only(report: Report) -> Finding:
    (found,) = report.channels
    return found


@pytest.mark.parametrize("channel", CHANNELS)
async def test_a_leak_is_found(channel: str) -> None:
    report = await seen(leaking(channel), channel)
    assert (report.verdict, only(report).outcome) == ("leak", "leak"), only(report).reason
    assert report.exit_code == 3
    assert only(report).facts.name == channel


@pytest.mark.parametrize("channel", CHANNELS)
async def test_no_leak_is_found_where_there_is_none(channel: str) -> None:
    report = await seen(tight(channel), channel)
    found = only(report)
    assert (report.verdict, found.outcome) == ("clean", "clean"), found.reason
    assert found.evidence is not None
    assert found.evidence.auc.holds_chance
    assert found.evidence.auc.halfwidth <= MARGIN


@pytest.mark.parametrize(
    "channel", sorted(set(CHANNELS) - TIMED_BY_PLAIN_PROMPTS - {"eviction", "no_key"})
)
async def test_a_leak_elsewhere_stays_unseen_by_plain_prompts(channel: str) -> None:
    report = await seen(leaking(channel), "ttft")
    assert report.verdict == "clean"


async def test_a_server_that_shares_everything_is_found_in_every_timed_way() -> None:
    server = FakeServer(leaks=frozenset({"ttft"}))
    report = await seen(server, "ttft", "early_bird", "boundary", "empty", "sentinel")
    assert {finding.outcome for finding in report.channels} == {"leak"}


async def test_early_bird_recovers_what_leaks_and_nothing_else() -> None:
    found = only(await seen(FakeServer(leaks=frozenset({"ttft"})), "early_bird"))
    assert found.figures["recovered_share"] == 1.0
    assert found.figures["requests_per_recovered"] == 20.0
    found = only(await seen(FakeServer(), "early_bird"))
    assert found.figures["recovered_share"] == 0.0


def test_recovery_needs_five_of_ten() -> None:
    limits = [1.5] * 20
    four = [Pair(1.0, 2.0)] * 4 + [Pair(2.0, 2.0)] * 6
    five = [Pair(1.0, 2.0)] * 5 + [Pair(2.0, 2.0)] * 5
    both = [Pair(1.0, 1.0)] * 10
    assert recovery(four, limits[:10])["recovered_share"] == 0.0
    assert recovery(five, limits[:10])["recovered_share"] == 1.0
    assert recovery(five, [2.5] * 10)["wrong_taken_share"] == 1.0
    assert recovery([*both, *five], limits)["wrong_taken_share"] == 0.5
    assert recovery(five[:9], limits[:9]) == {}


@pytest.mark.parametrize(
    ("channel", "server", "reason"),
    [
        ("cached_tokens", FakeServer(reports=False), "does not report"),
        ("no_key", FakeServer(), "without a key"),
        ("reply_order", FakeServer(most_at_once=8), "16 requests at a time (429)"),
        ("eviction", FakeServer(), "outlive 32,768 tokens"),
    ],
)
async def test_what_a_target_does_not_offer_is_skipped(
    channel: str, server: FakeServer, reason: str
) -> None:
    report = await seen(server, channel, "ttft")
    assert report.channels[0].outcome == "skipped"
    assert reason in report.channels[0].reason
    assert report.verdict == "clean"


async def test_sybils_need_a_third_key() -> None:
    server = FakeServer()
    alone = replace(options("sybils"), cast=replace(CAST, sybils=()))
    report = await audit(alone, transport=server.transport(), clock=server.time.clock())
    assert only(report).outcome == "skipped"
    assert report.verdict == "void"


async def test_an_order_that_ignores_own_hits_voids_its_own_channel_alone() -> None:
    report = await seen(FakeServer(own_order=False), "reply_order", "ttft")
    assert [finding.outcome for finding in report.channels] == ["void", "clean"]
    assert report.verdict == "clean"
    assert "void: reply_order" in report.reason


async def test_spoofs_carry_the_victims_name() -> None:
    server = FakeServer()
    await seen(server, "spoofed_headers", "spoofed_fields")
    assert any(headers.get("x-kvkeep-tenant") == "victim" for headers in server.seen_headers)
    assert any(body.get("user") == "victim" for body in server.bodies)
