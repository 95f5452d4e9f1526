from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from kvkeep.engine.speeds import GIGABIT_BYTES
from kvkeep.errors import ConfigError
from kvkeep.sim.cluster import (
    PHASES,
    Cluster,
    Link,
    Outcome,
    Prefixes,
    Simulation,
    Tenants,
    Wire,
)
from kvkeep.sim.costs import Costs
from kvkeep.sim.load import Drawn, Load, draw
from kvkeep.sim.workers import Size
from tests.sim.made import COSTS

LOAD = Load("azure_conv", 400, 0.6, scale=0.5)
ONE = Cluster("bf16", link=Link(0.02))
NOBODY = Tenants()


def drawn(*requests: tuple[float, int, int]) -> Drawn:
    at, prompt, answer = zip(*requests, strict=True)
    return Drawn(np.array(at, float), np.array(prompt), np.array(answer))


def run(cluster: Cluster, load: Drawn, tenants: Tenants = NOBODY) -> Outcome:
    return Simulation(cluster, COSTS, tenants).run(load)


def test_one_request_takes_what_its_parts_take() -> None:
    (one,) = run(replace(ONE, link=Link(0.02, 0.01, streamed=False)), drawn((5.0, 600, 11))).served
    prefill = COSTS.chunk_time_s(512, 0) + COSTS.chunk_time_s(88, 512)
    transfer = 600 * 1000 / (0.02 * GIGABIT_BYTES) + 0.01
    decode = sum(COSTS.step_time_s("bf16", 1, 601 + i) for i in range(10))
    told = dict(zip(PHASES, one.phases, strict=True))
    expected = dict.fromkeys(PHASES, 0.0) | {
        "prefill": prefill,
        "transfer": transfer,
        "install": COSTS.handover_s,
        "decode": decode,
    }
    assert told == pytest.approx(expected)
    assert one.jct_s == pytest.approx(prefill + transfer + COSTS.handover_s + decode)
    assert one.ttft_s == pytest.approx(prefill)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("codec", ["bf16", "k2v2"])
@pytest.mark.parametrize("decoders", [0, 1, 3])
def test_every_request_ends_and_its_phases_are_its_time(
    codec: str, decoders: int, streamed: bool
) -> None:
    cluster = Cluster(codec, 2, decoders, Link(0.02, streamed=streamed))
    found = run(cluster, draw(LOAD))
    assert len(found.served) == LOAD.requests
    for one in found.served:
        assert sum(one.phases) == pytest.approx(one.jct_s)
        assert min(one.phases) >= -1e-9
        assert one.ttft_s <= one.jct_s
    assert 0 < found.busiest_worker <= 1
    assert sum(found.phase_shares().values()) == pytest.approx(1.0)


def test_waiting_is_that_of_a_queue_with_one_server_and_equal_services() -> None:
    service = COSTS.chunk_time_s(512, 0)
    for busy in (0.5, 0.8):
        chance = np.random.default_rng(0)
        at = np.cumsum(chance.exponential(service / busy, 20_000))
        rows = np.full(len(at), 512)
        found = run(ONE, Drawn(at, rows, np.ones_like(rows)))
        waited = np.mean([one.phases[0] for one in found.served])
        assert waited == pytest.approx(busy / (2 * (1 - busy)) * service, rel=0.08)


def test_a_streamed_transfer_hides_behind_its_prefill_up_to_the_last_layer() -> None:
    wire = Wire(Link(8.0))  # a gigabyte a second
    assert wire.send(0.0, 10.0, 5e9, 1e8) == pytest.approx(10.1, abs=1e-3)
    assert wire.send(10.0, 20.0, 40e9, 1e8) == pytest.approx(50.1, abs=1e-3), "the link is slower"
    assert wire.send(20.0, 30.0, 1e9, 1e8) == pytest.approx(51.1, abs=1e-3), "and is busy"
    whole = Wire(Link(8.0, streamed=False))
    assert whole.send(0.0, 10.0, 5e9, 1e8) == pytest.approx(15.0, abs=1e-3)


def test_streaming_and_codes_shorten_what_a_slow_link_makes_long() -> None:
    times = {
        (codec, streamed): run(
            Cluster(codec, 1, 1, Link(0.01, streamed=streamed)), draw(LOAD)
        ).jct()
        for codec in ("bf16", "k2v2")
        for streamed in (True, False)
    }
    assert times["k2v2", True] < times["k2v2", False] < times["bf16", False]
    assert times["bf16", True] < times["bf16", False]


def test_what_a_worker_holds_is_neither_computed_nor_sent() -> None:
    asking = Tenants(count=1, templates=1, template_tokens=256)
    cluster = replace(ONE, cache_tokens=10_000)
    first, second = run(cluster, drawn((0.0, 300, 5), (50.0, 300, 5)), asking).served
    assert (first.found_tokens, second.found_tokens) == (0, 256)
    assert first.sent_bytes - second.sent_bytes == 256 * 1000
    assert second.ttft_s == pytest.approx(COSTS.chunk_time_s(44, 256))
    nothing = run(ONE, drawn((0.0, 300, 5), (50.0, 300, 5)), asking)
    assert nothing.hit_ratio == 0.0


def test_public_prefixes_are_found_by_all_and_fetched_once_by_each_worker() -> None:
    asking = Tenants(count=50, templates=1, template_tokens=256, public_templates=1)
    cluster = replace(ONE, prefill_workers=3)
    found = run(cluster, drawn(*((float(i), 300, 1) for i in range(60))), asking)
    assert [one.found_tokens for one in found.served] == [256] * 60
    assert found.snapshot_bytes == 3 * 256 * 1000


def test_the_least_recently_used_prefix_goes_first() -> None:
    kept = Prefixes(300)
    assert [kept.found((0, i), 100) for i in (1, 2, 3)] == [0, 0, 0]
    assert kept.found((0, 1), 150) == 100, "and 2 makes way for what is longer now"
    assert [kept.found((0, i), 100) for i in (3, 2)] == [100, 0]
    assert kept.found((0, 9), 1000) == 0
    assert kept.found((0, 9), 1000) == 0, "too long to be kept"
    assert kept.found((0, 2), 100) == 100, "and nothing makes way for it"


def test_tenants_stay_with_their_worker_whoever_else_asks() -> None:
    asking = Tenants(count=40, templates=2, template_tokens=256)
    cluster = Cluster("bf16", 4, 2, cache_tokens=10**6, prefill_size=Size(chunk_tokens=512))
    few = run(cluster, drawn(*((100.0 * i, 300, 2) for i in range(50))), asking)
    many = run(cluster, drawn(*((0.001 * i, 300, 2) for i in range(50))), asking)
    assert sorted(one.found_tokens for one in few.served) == sorted(
        one.found_tokens for one in many.served
    )


def test_a_worker_that_never_rests_is_busy_all_the_time() -> None:
    # Each row that comes cuts the time short in which the others were decoded on.
    rows = drawn(*((0.05 * i, 10, 400) for i in range(20)))
    assert run(Cluster("bf16", 1, 0), rows).busiest_worker == pytest.approx(1.0, abs=1e-3)


def test_the_same_load_gives_the_same_outcome() -> None:
    assert run(ONE, draw(LOAD)) == run(ONE, draw(LOAD))


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="codec: 'fp8' was not measured; there are bf16, k2v2"):
        run(replace(ONE, codec="fp8"), draw(LOAD))
    with pytest.raises(ConfigError, match="prefill_workers"):
        replace(ONE, prefill_workers=0)
    with pytest.raises(ConfigError, match="gigabits_per_s"):
        replace(ONE, link=Link(0.0))


def blocks(tokens: int) -> Costs:
    """Return costs where whole blocks are handed over coded, a tenth as large."""
    codec = msgspec.structs.replace(
        COSTS.codecs["bf16"], block_tokens=tokens, bytes_per_token=COSTS.bytes_per_token / 10
    )
    return msgspec.structs.replace(COSTS, codecs={"bf16": codec})


def test_what_is_left_of_a_prompt_is_handed_over_in_sixteen_bits() -> None:
    costs = blocks(128)
    slow = replace(ONE, link=Link(0.02, 0.0, streamed=False))
    (one,) = Simulation(slow, costs, NOBODY).run(drawn((0.0, 300, 6))).served
    assert one.sent_bytes == pytest.approx(256 * 100 + 44 * 1000)
    decode = sum(costs.step_time_s("bf16", 1, 301 + i) for i in range(5))
    told = dict(zip(PHASES, one.phases, strict=True))
    assert told["transfer"] == pytest.approx(one.sent_bytes / (0.02 * GIGABIT_BYTES))
    assert told["decode"] == pytest.approx(decode)
    (whole,) = Simulation(slow, costs, NOBODY).run(drawn((0.0, 256, 6))).served
    assert whole.sent_bytes == pytest.approx(256 * 100)


def test_rows_that_a_link_brings_later_than_they_are_computed_are_computed_again() -> None:
    blocks = msgspec.structs.replace(
        COSTS.codecs["bf16"], block_tokens=128, bytes_per_token=COSTS.bytes_per_token / 10
    )
    costs = msgspec.structs.replace(COSTS, codecs={"bf16": blocks})
    slow = Cluster("bf16", link=Link(0.0002, token_s=0.001))  # 40 ms for a token in 16 bits
    (one,) = Simulation(slow, costs, NOBODY).run(drawn((0.0, 300, 6))).served
    assert one.sent_bytes == pytest.approx(256 * 100)
    told = dict(zip(PHASES, one.phases, strict=True))
    assert told["decode"] > costs.chunk_time_s(44, 256), "its last 44 tokens among it"
    (sent,) = (
        Simulation(replace(slow, link=Link(0.0002)), costs, NOBODY).run(drawn((0.0, 300, 6))).served
    )
    assert sent.sent_bytes == pytest.approx(256 * 100 + 44 * 1000)
    assert sent.jct_s - one.jct_s == pytest.approx(
        44 * 0.04 - costs.chunk_time_s(44, 256), rel=0.05
    )
    tenants = Tenants(templates=1, template_tokens=320)
    held = replace(slow, cache_tokens=10_000)
    _, found = Simulation(held, costs, tenants).run(drawn((0.0, 330, 6), (50.0, 330, 6))).served
    assert (found.found_tokens, found.sent_bytes) == (320, 0.0), "what is found is not sent"
    (stays,) = Simulation(slow, costs, NOBODY).run(drawn((0.0, 100, 6))).served
    assert stays.sent_bytes == 0.0, "nothing of it would be sent"


def test_short_prompts_stay_where_they_are_answered() -> None:
    load = drawn((0.0, 900, 9), (0.01, 100, 9))
    _, stays = sorted(run(replace(ONE, least_tokens=128), load).served)
    assert stays.sent_bytes == 0.0
    assert stays.phases[0] == pytest.approx(0.0), "nobody waits behind the prefill worker's prompt"
    _, waits = sorted(run(ONE, load).served)
    assert waits.phases[0] > 0.5


def test_an_answer_of_one_token_is_the_prefill_workers() -> None:
    load = drawn((0.0, 900, 9), (0.01, 900, 1))
    _, one = sorted(run(replace(ONE, least_tokens=128), load).served)
    assert one.sent_bytes == 0.0
    assert one.jct_s == one.ttft_s
    assert one.phases[0] > 0.5, "it waits behind the prompt before it"
