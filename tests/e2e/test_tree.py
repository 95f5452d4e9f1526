"""A long run of the engine gives the same tokens and scores whichever planner reads its pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvkeep.attention.planner import AttentionPlanner, FlatPlanner
from kvkeep.engine.api import Chunk, EngineStats, GenerateRequest, SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.policy import KeepAll
from kvkeep.quant.codec import Float
from kvkeep.sharing.policy import ShareAll
from kvkeep.shield.policy import NoShield
from tests.engines import core_for, drive, request
from tests.forests import eager

TENANTS = ("a", "b")


def asked(count: int, seed: int) -> list[GenerateRequest]:
    """Return requests that branch off a few common beginnings, some sampled, some several."""
    rng = np.random.default_rng(seed)
    common = [int(t) for t in rng.integers(1, 200, 400)]
    found = []
    for number in range(count):
        begin = common[: int(rng.choice([0, 260, 330, 400]))]
        own = [int(t) for t in rng.integers(1, 200, int(rng.integers(5, 90)))]
        params = SamplingParams(
            max_tokens=int(rng.integers(4, 30)),
            temperature=float(rng.choice([0.0, 0.9])),
            seed=number,
            n=int(rng.choice([1, 1, 2])),
            logprobs=1,
            ignore_eos=True,
        )
        tenant = TENANTS[number % 2]
        found.append(request(begin + own, params, id=str(number), tenant=tenant))
    return found


def run(model: Path, planner: AttentionPlanner, dtype: str) -> tuple[object, EngineStats]:
    """Return everything the clients saw, and the engine's counts."""
    parts = Parts(
        techniques=Techniques(Float(), NoShield(), KeepAll()), planner=planner, policy=ShareAll()
    )
    core = core_for(
        model,
        parts=parts,
        pages=44,
        page_bytes=24 << 10,
        dtype=dtype,
        tenants={"a": 0.45, "b": 0.45},
    )
    drive(core, asked(2, seed=1))
    replies = drive(core, asked(24, seed=1))
    return {
        name: [_seen(chunk) for chunk in chunks] for name, chunks in replies.items()
    }, core.stats()


def _seen(chunk: Chunk) -> tuple[object, ...]:
    return chunk.index, chunk.token_ids, chunk.logprobs, chunk.finish, chunk.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tree_gives_the_flat_planners_replies(tiny: dict[str, Path], dtype: str) -> None:
    flat, without = run(tiny["qwen2"], FlatPlanner(), dtype)
    tree, used = run(tiny["qwen2"], eager(2), dtype)
    assert tree == flat
    assert without.attention_tree_steps_total == 0
    assert used.attention_tree_steps_total > 20
    assert used.attention_planned_bytes_total < 0.9 * used.attention_flat_bytes_total
    assert used.preemptions_total > 0
