from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import simpy

from kvkeep.sim.workers import Size, Steps, Worker
from tests.sim.made import COSTS


class Ask(NamedTuple):
    """An answer that is wanted of a worker."""

    at_s: float
    tokens: int
    context: int


def ends(asks: Sequence[Ask], size: Size) -> list[float]:
    """Return when each ends."""
    env = simpy.Environment()
    worker = Worker(env, COSTS, "bf16", size)
    worker.start()
    found = [0.0] * len(asks)

    def ask(number: int, one: Ask) -> Steps:
        yield env.timeout(one.at_s)
        yield worker.decode(one.tokens, one.context).ended
        found[number] = env.now

    for number, one in enumerate(asks):
        env.process(ask(number, one))
    env.run()
    return found


def ends_step_by_step(asks: Sequence[Ask], max_rows: int) -> list[float]:
    """Return the same, one step at a time: slow and obvious."""
    left = [one.tokens for one in asks]
    context = [one.context for one in asks]
    waiting, rows = sorted(range(len(asks)), key=lambda i: asks[i].at_s), list[int]()
    found, now = [0.0] * len(asks), 0.0
    while waiting or rows:
        while waiting and len(rows) < max_rows and asks[waiting[0]].at_s <= now:
            rows.append(waiting.pop(0))
        if not rows:
            now = asks[waiting[0]].at_s
            continue
        now += COSTS.step_time_s("bf16", len(rows), sum(context[i] for i in rows))
        for i in rows:
            left[i] -= 1
            context[i] += 1
            if not left[i]:
                found[i] = now
        rows = [i for i in rows if left[i]]
    return found


@pytest.mark.parametrize("max_rows", [1, 2, 8])
def test_decoding_on_is_the_same_as_step_by_step(max_rows: int) -> None:
    asks = [
        Ask(0.0, 50, 1000),
        Ask(0.33, 7, 20_000),
        Ask(0.34, 120, 3),
        Ask(1.7, 30, 500),
        Ask(9.0, 12, 100),
    ]
    # The mean of growing contexts, cut where one comes, is off by the growth of a few steps.
    assert ends(asks, Size(max_rows=max_rows)) == pytest.approx(
        ends_step_by_step(asks, max_rows), rel=2e-3
    )


def test_rows_wait_for_room_and_one_alone_never_does() -> None:
    size = Size(memory_bytes=COSTS.held_bytes("bf16", 1100))
    alone = ends([Ask(0.0, 100, 1000)], size)[0]
    both = ends([Ask(0.0, 100, 1000), Ask(0.0, 100, 1000)], size)
    assert both == pytest.approx([alone, 2 * alone], rel=1e-3)
    assert ends([Ask(0.0, 100, 5000)], size)[0] > alone


def test_prompts_are_computed_in_their_order_and_in_chunks() -> None:
    env = simpy.Environment()
    worker = Worker(env, COSTS, "k2v2", Size(chunk_tokens=512))
    worker.start()
    one, other = worker.compute(1000, 64), worker.compute(10, 0)
    assert worker.queued_tokens == 1010
    env.run(one.computed)
    encoded = 1000 * 1e-5
    took = COSTS.chunk_time_s(512, 64) + COSTS.chunk_time_s(488, 576) + encoded
    assert (env.now, one.encode_s) == pytest.approx((took, encoded))
    env.run(other.computed)
    assert other.begun_s == pytest.approx(took)
    assert worker.queued_tokens == 0


def test_a_row_goes_on_beside_a_prompt_a_token_a_chunk() -> None:
    env = simpy.Environment()
    worker = Worker(env, COSTS, "bf16", Size(chunk_tokens=512))
    worker.start()
    row = worker.decode(3, 100)
    worker.compute(1024, 0)
    env.run(row.ended)
    steps = [COSTS.step_time_s("bf16", 1, 100 + i) for i in range(3)]
    chunks = COSTS.chunk_time_s(512, 0) + COSTS.chunk_time_s(512, 512)
    assert env.now == pytest.approx(sum(steps) + chunks)
