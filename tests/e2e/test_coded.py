"""Coded pages: what a row sees is a function of its position, whatever was cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvkeep.attention.planner import FlatPlanner
from kvkeep.engine.api import Chunk, SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.engine import EngineCore
from kvkeep.eviction.policy import KeepAll
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS
from tests.engines import core_for, drive, request
from tests.toys import EightBit

PARAMS = SamplingParams(max_tokens=6, temperature=0.8, seed=7, logprobs=2, ignore_eos=True)
LENGTH = 450


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def coded_core(model: Path, window: int, **options: object) -> EngineCore:
    techniques = Techniques(EightBit(window), NoShield(), KeepAll())
    parts = Parts(techniques=techniques, planner=FlatPlanner(), policy=ShareNothing())
    return core_for(model, parts=parts, **{"chunk_tokens": 64, **options})  # type: ignore[arg-type]


def bits(chunks: list[Chunk]) -> list[object]:
    return [(c.text, c.token_ids, c.logprobs) for c in chunks]


def warm_runs(core: EngineCore) -> tuple[list[object], list[int]]:
    """Return what the prompt says after each number of its pages was sent, and what was found."""
    prompt = prompt_of(LENGTH)
    said: list[object] = []
    found: list[int] = []
    for pages in range(LENGTH // PAGE_TOKENS + 1):
        scope = f"s{pages}"
        if pages:
            drive(core, [request(prompt[: pages * PAGE_TOKENS], PARAMS, scope=scope)])
        chunks = drive(core, [request(prompt, PARAMS, scope=scope)])["r"]
        said.append(bits(chunks))
        found.append(chunks[0].cached_tokens)
    return said, found


@pytest.mark.parametrize("window", [128, 256])
def test_cold_and_warm_are_equal_for_every_number_of_pages_found(
    tiny: dict[str, Path], window: int
) -> None:
    said, found = warm_runs(coded_core(tiny["qwen2"], window))
    assert found == [pages * PAGE_TOKENS // window * window for pages in range(len(said))]
    assert all(one == said[0] for one in said)


def test_hits_that_end_inside_a_block_would_change_what_is_said(tiny: dict[str, Path]) -> None:
    """The test above can fail: rows would see codes that a cold run sees as they were computed."""
    core = coded_core(tiny["qwen2"], 256)
    manager = core._manager
    manager.pool.spec = replace(manager.pool.spec, window_tokens=128)
    manager._closer._spec = manager.pool.spec
    manager._matcher._block_pages = 2
    said, found = warm_runs(core)
    assert [pages for pages, one in enumerate(said) if one != said[0]] == [2, 3, 6, 7]
    assert found[2] == found[3] == 128
