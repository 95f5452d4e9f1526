"""Bits do not depend on company: alone, batched, cold, warm, chunked, any thread count, any tenant
beside.
"""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvkeep.engine.api import Chunk, SamplingParams
from kvkeep.engine.engine import EngineCore
from tests.counts import examples
from tests.engines import core_for, drive, request

PARAMS = SamplingParams(max_tokens=10, temperature=0.8, seed=7, logprobs=4, ignore_eos=True)
LENGTHS = (1, 64, 130, 300)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def bits(chunks: list[Chunk]) -> list[object]:
    """Return everything a tenant sees of its own tokens, log-probabilities to the last bit."""
    return [
        (chunk.text, chunk.token_ids, tuple((p.token_id, p.logprob, p.top) for p in chunk.logprobs))
        for chunk in chunks
    ]


def alone(core: EngineCore, length: int) -> list[object]:
    return bits(drive(core, [request(prompt_of(length, length), PARAMS, id="x")])["x"])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(tiny: dict[str, Path], dtype: str) -> dict[int, list[object]]:
    """Return each prompt's bits from a fresh core: one thread, one chunk, nobody else."""
    found = {}
    for length in LENGTHS:
        core = core_for(tiny["qwen2"], dtype=dtype, threads=1, chunk_tokens=512)
        found[length] = alone(core, length)
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk_tokens", [16, 48, 512])
def test_chunks_threads_cold_and_warm(
    tiny: dict[str, Path],
    dtype: str,
    expected: dict[int, list[object]],
    threads: int,
    chunk_tokens: int,
) -> None:
    core = core_for(tiny["qwen2"], dtype=dtype, threads=threads, chunk_tokens=chunk_tokens)
    for length in LENGTHS:
        assert alone(core, length) == expected[length], "cold"
        assert alone(core, length) == expected[length], "warm"


def test_in_a_batch_with_strangers(
    tiny: dict[str, Path], dtype: str, expected: dict[int, list[object]]
) -> None:
    core = core_for(tiny["qwen2"], dtype=dtype, chunk_tokens=32)
    mine = [request(prompt_of(n, n), PARAMS, id=str(n)) for n in LENGTHS]
    others = [request(prompt_of(50 + 17 * i, i), PARAMS, id=f"s{i}", tenant="b") for i in range(12)]
    got = drive(core, [r for pair in zip(others, mine, strict=False) for r in pair] + others[4:])
    for length in LENGTHS:
        assert bits(got[str(length)]) == expected[length]


STRANGER = st.tuples(st.integers(0, 12), st.integers(1, 260), st.integers(0, 3))


@settings(max_examples=examples(4, 8), deadline=None)
@given(strangers=st.lists(STRANGER, max_size=6))
def test_what_a_tenant_sees_is_a_function_of_its_own_history(
    tiny: dict[str, Path], strangers: list[tuple[int, int, int]]
) -> None:
    """Run a tenant's conversation with and without others around it: hits, tokens, bits and order
    are equal.
    """

    def world(company: list[tuple[int, int, int]]) -> list[object]:
        core = core_for(tiny["llama"], tenants={"a": 0.5, "b": 0.5}, kv_cache_bytes=8 << 20)
        seen: list[object] = []
        arrivals = {step: (length, seed) for step, length, seed in company}

        def stranger(step: int) -> None:
            if step in arrivals:
                length, seed = arrivals.pop(step)
                core.submit(request(prompt_of(length, seed), PARAMS, id=f"b{step}", tenant="b"))

        for turn, length in enumerate((70, 70, 200, 140)):
            pair = [
                request(prompt_of(length, length), PARAMS, id=f"a{turn}"),
                request(prompt_of(length + 5, length), PARAMS, id=f"c{turn}"),
            ]
            got = drive(core, pair, stranger)
            seen += [(bits(got[r.id]), [c.cached_tokens for c in got[r.id]]) for r in pair]
            seen.append([name for name in got if name[0] in "ac"])
        return seen

    assert world(strangers) == world([])
