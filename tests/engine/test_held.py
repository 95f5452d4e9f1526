"""The best of several samples: those of the same request for all, ranked by their mean."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from kvkeep.engine.api import Chunk, FinishReason, SamplingParams
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.held import BestOf
from tests.engines import core_for, drive, request

PROMPT = [int(t) for t in np.random.default_rng(0).integers(1, 200, 70)]


@pytest.fixture(scope="module")
def core(tiny: dict[str, Path]) -> EngineCore:
    return core_for(tiny["llama"])


def test_the_best_of_six_are_the_likeliest_of_the_six(core: EngineCore) -> None:
    ends = tuple(range(1, 60))
    draw = SamplingParams(max_tokens=12, seed=5, n=6, logprobs=0, stop_token_ids=ends)
    chunks = drive(core, [request(PROMPT, draw)])["r"]
    samples: dict[int, tuple[list[int], list[float]]] = {i: ([], []) for i in range(6)}
    for chunk in chunks:
        samples[chunk.index][0].extend(chunk.token_ids)
        samples[chunk.index][1].extend(t.logprob for t in chunk.logprobs)
    assert len({len(ids) for ids, _ in samples.values()}) > 1, "some ended sooner"
    ranked = sorted(samples.values(), key=lambda sample: -fmean(sample[1]))
    best = SamplingParams(max_tokens=12, seed=5, n=2, best_of=6, stop_token_ids=ends)
    told = drive(core, [request(PROMPT, best)])["r"]
    assert [list(c.token_ids) for c in told] == [ids for ids, _ in ranked[:2]]
    assert [c.score for c in told] == pytest.approx([fmean(p) for _, p in ranked[:2]])
    assert [c.index for c in told] == [0, 1]
    assert all(c.logprobs == () for c in told), "nobody asked for them"
    generated = sum(len(c.token_ids) + c.unsent_tokens for c in told)
    assert generated == sum(len(ids) for ids, _ in samples.values())


def test_the_best_of_as_many_as_are_told_is_an_ordinary_request(core: EngineCore) -> None:
    params = SamplingParams(max_tokens=6, seed=1, n=2, best_of=2, ignore_eos=True)
    chunks = drive(core, [request(PROMPT, params)])["r"]
    assert len(chunks) > 2
    assert all(c.score is None and c.unsent_tokens == 0 for c in chunks)


def test_a_deadline_is_the_whole_requests(core: EngineCore) -> None:
    params = SamplingParams(max_tokens=3000, n=1, best_of=3, ignore_eos=True)
    chunks = drive(core, [request(PROMPT, params, deadline_s=0.05)])["r"]
    assert [c.finish for c in chunks] == [FinishReason.DEADLINE]


def test_a_sample_that_fails_fails_the_request(core: EngineCore) -> None:
    bias = tuple((i, -float("inf")) for i in range(core.info.vocab_size))
    params = SamplingParams(max_tokens=8, n=1, best_of=3, logit_bias=bias)
    chunks = drive(core, [request(PROMPT, params)])["r"]
    assert [c.finish for c in chunks] == [FinishReason.ERROR]
    assert "no token is left" in (chunks[0].error or "")
    assert core.idle()


def test_prompt_log_probabilities_stay_with_the_first(core: EngineCore) -> None:
    params = SamplingParams(max_tokens=4, n=2, best_of=4, prompt_logprobs=0, seed=2)
    chunks = drive(core, [request(PROMPT, params)])["r"]
    assert len(chunks[0].prompt_logprobs or ()) == len(PROMPT)
    assert chunks[1].prompt_logprobs is None


def test_equal_samples_keep_their_order() -> None:
    held = BestOf(2)
    for index in (2, 0, 1):
        held.note(index, -1.0)
        held.add(Chunk(index=index, token_ids=(index,)))
        held.add(Chunk(index=index, finish=FinishReason.STOP))
    assert [c.token_ids for c in held.result()] == [(0,), (1,)]
