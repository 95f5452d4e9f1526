"""Greedy output equals transformers' token for token, however the engine arrives at it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvkeep.config import DEMO_MODEL
from tests.engines import GREEDY, core_for, drive, greedy_oracle, request, tokens

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
TOKENS = 12


def prompt_of(length: int, seed: int = 0, vocab: int = 200) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, vocab, length)]


@pytest.mark.parametrize("family", FAMILIES)
def test_cold_warm_and_batched_equal_transformers(family: str, tiny: dict[str, Path]) -> None:
    path = tiny[family]
    core = core_for(path, chunk_tokens=48)
    prompts = {f"r{i}": prompt_of(length, i) for i, length in enumerate([1, 63, 64, 65, 130, 200])}
    expected = {k: greedy_oracle(path, p, TOKENS) for k, p in prompts.items()}
    for name, prompt in prompts.items():
        cold = drive(core, [request(prompt, id=name)])[name]
        assert tokens(cold) == expected[name], name
        warm = drive(core, [request(prompt, id=name)])[name]
        assert tokens(warm) == expected[name], name
        assert warm[0].cached_tokens == len(prompt) or len(prompt) == 1
    strangers = [request(prompt_of(90 + i, 50 + i), id=f"s{i}", tenant="b") for i in range(10)]
    batch = drive(core, [request(p, id=n) for n, p in prompts.items()] + strangers)
    for name in prompts:
        assert tokens(batch[name]) == expected[name], name


def test_the_demo_model_equals_transformers() -> None:
    core = core_for(DEMO_MODEL, dtype="float32", chunk_tokens=64)
    for length in (5, 200):
        prompt = prompt_of(length, length, vocab=2000)
        expected = greedy_oracle(DEMO_MODEL, prompt, TOKENS)
        for name in ("cold", "warm"):
            assert tokens(drive(core, [request(prompt, id=name)])[name]) == expected


def test_preempted_sequences_go_on_with_the_same_tokens(tiny: dict[str, Path]) -> None:
    path = tiny["llama"]
    params = GREEDY.__class__(max_tokens=100, temperature=0.0, ignore_eos=True)
    prompts = {f"r{i}": prompt_of(100 + i, i) for i in range(4)}
    roomy = core_for(path)
    expected = drive(roomy, [request(p, params, id=n) for n, p in prompts.items()])
    page_bytes = roomy.info.bytes_per_token * 64
    tight = core_for(path, tenants={"a": 1.0}, pages=11, page_bytes=page_bytes)
    got = drive(tight, [request(p, params, id=n) for n, p in prompts.items()])
    assert tight.stats().preemptions_total > 0
    for name in prompts:
        assert tokens(got[name]) == tokens(expected[name])


def test_ten_turn_chat_computes_only_its_new_tokens_and_a_page(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["llama"], max_num_batched_tokens=2048)
    history = prompt_of(40)
    for turn in range(10):
        chunks = drive(core, [request(history, id=f"t{turn}")])[f"t{turn}"]
        if turn:
            assert len(history) - chunks[0].cached_tokens <= 30 + 64
        history = history + tokens(chunks) + prompt_of(18, turn)
