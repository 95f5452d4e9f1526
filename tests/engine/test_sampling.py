"""The sampler against the slow oracle, row independence, and every setting's edge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.sampling import Sampled, Sampler, SequenceSampling
from kvkeep.errors import EngineError, InvalidRequest
from kvkeep.ops import available, select
from kvkeep.ops.layout import SampleOps
from tests.counts import examples
from tests.oracles_sampling import (
    chi_square,
    chi_square_limit,
    edited_logits,
    token_probabilities,
)

VOCAB = 200
EOS = 3


@pytest.fixture(scope="module", params=["reference", available()[0]])
def kernels(request: pytest.FixtureRequest) -> SampleOps:
    return select(request.param, 2).sample


def state(
    params: SamplingParams, prompt: tuple[int, ...] = (1, 2, 2), index: int = 0, vocab: int = VOCAB
) -> SequenceSampling:
    return SequenceSampling(
        params, prompt, sample_index=index, vocab_size=vocab, eos_ids=(EOS, vocab + 7)
    )


def params(**settings: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.8, "seed": 11, **settings})  # type: ignore[arg-type]


def random_logits(rows: int = 1, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, vocab, generator=generator) * scale


def one(kernels: SampleOps, logits: torch.Tensor, sampling: SequenceSampling) -> int:
    result = Sampler(logits.shape[-1], kernels).sample(logits, [sampling])
    assert result.errors == [None]
    return result.token_ids[0]


def draws(
    kernels: SampleOps, logits: torch.Tensor, setting: SamplingParams, count: int
) -> np.ndarray:
    """Return how often each token is drawn at `count` consecutive positions."""
    sampler, sampling = Sampler(logits.shape[-1], kernels), state(setting, vocab=logits.shape[-1])
    counts = np.zeros(logits.shape[-1], np.int64)
    for _ in range(count):
        token = sampler.sample(logits, [sampling]).token_ids[0]
        counts[token] += 1
        sampling.position += 1
    return counts


MORE = [
    params(temperature=1.7),
    params(top_p=0.3),
    params(top_k=2),
    params(top_k=60),
    params(top_k=12, top_p=0.6),
]
"""Settings that meet no code that those of `make test` do not meet."""


@pytest.mark.parametrize(
    "setting",
    [
        params(temperature=1.0),
        params(temperature=0.3),
        params(top_p=0.9),
        params(top_p=0.05),
        params(min_p=0.1),
        params(top_k=1),
        params(top_k=VOCAB + 1, top_p=0.7),
        params(top_k=12, top_p=0.95, min_p=0.2),
        params(top_p=0.7, min_p=0.05),
        *(pytest.param(setting, marks=pytest.mark.slow) for setting in MORE),
    ],
)
def test_draws_follow_the_oracle(kernels: SampleOps, setting: SamplingParams) -> None:
    logits = random_logits()
    expected = token_probabilities(logits[0].numpy(), setting)
    counts = draws(kernels, logits, setting, 4000)
    assert counts[expected == 0.0].sum() == 0
    statistic, freedom = chi_square(counts, expected)
    assert statistic < chi_square_limit(freedom)


def test_the_distribution_test_notices_a_wrong_temperature(kernels: SampleOps) -> None:
    logits = random_logits()
    counts = draws(kernels, logits, params(temperature=0.9), 4000)
    statistic, freedom = chi_square(
        counts, token_probabilities(logits[0].numpy(), params(temperature=0.7))
    )
    assert statistic > chi_square_limit(freedom)


@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.5, 0.50001, 0.9, 0.99, 1.0])
def test_a_nucleus_cuts_equal_weights_by_lowest_id(kernels: SampleOps, top_p: float) -> None:
    logits = torch.zeros(1, 8)
    counts = draws(kernels, logits, params(top_p=top_p), 400)
    kept = max(1, math.ceil(top_p * 8))
    assert (counts > 0).tolist() == [token < kept for token in range(8)]


@settings(max_examples=examples(30, 60), deadline=None)
@given(
    weights=st.lists(st.integers(0, 6), min_size=2, max_size=300),
    top_p=st.sampled_from([0.0, 1e-6, 0.25, 0.5, 0.75, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_only_kept_tokens_are_drawn(
    kernels: SampleOps, weights: list[int], top_p: float, top_k: int, min_p: float, seed: int
) -> None:
    logits = torch.tensor([weights], dtype=torch.float32)
    setting = params(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    token = one(kernels, logits, state(setting, vocab=len(weights)))
    looser = params(temperature=1.0, top_p=top_p + 1e-5, top_k=top_k, min_p=min_p * (1 - 1e-5))
    assert token_probabilities(logits[0].numpy(), looser)[token] > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(kernels: SampleOps, dtype: torch.dtype) -> None:
    vocab = 4999
    logits = random_logits(6, vocab).to(dtype)
    settings = [
        params(top_p=0.9, logprobs=3),
        params(temperature=0.0, logprobs=2),
        params(top_k=40),
        params(repetition_penalty=1.3, presence_penalty=0.5, logprobs=0),
        params(min_p=0.02, seed=2**63 - 1),
        params(logit_bias=((4, 5.0),)),
    ]
    batch = Sampler(vocab, kernels)
    alone = Sampler(vocab, kernels)
    states = [state(s, index=i, vocab=vocab) for i, s in enumerate(settings)]
    for _ in range(3):
        together = batch.sample(logits, states)
        for row, sampling in enumerate(states):
            single = alone.sample(logits[row : row + 1], [sampling])
            assert single == Sampled(
                [together.token_ids[row]], [together.scores[row]], [together.errors[row]]
            )
        for sampling, token in zip(states, together.token_ids, strict=True):
            sampling.accept(token)


def test_draws_depend_on_seed_index_and_position_only(kernels: SampleOps) -> None:
    logits = random_logits(scale=0.1)
    first = state(params())
    again = state(params())
    sequence, repeated = [], []
    for _ in range(20):
        sequence.append(one(kernels, logits, first))
        first.accept(sequence[-1])
    for _ in range(20):
        repeated.append(one(kernels, logits, again))
        again.accept(repeated[-1])
    assert sequence == repeated
    assert one(kernels, logits, state(params(), prompt=tuple(range(23)))) == one(
        kernels, logits, first
    )
    others = {one(kernels, logits, state(params(), index=index)) for index in range(12)}
    seeds = {one(kernels, logits, state(params(seed=seed))) for seed in range(12)}
    unseeded = {one(kernels, logits, state(params(seed=None))) for _ in range(12)}
    assert min(len(others), len(seeds), len(unseeded)) > 6


@pytest.mark.parametrize(
    "setting",
    [
        params(temperature=0.0),
        params(temperature=1e-6, top_p=0.5),
        params(top_p=0.0),
        params(top_p=1e-12),
        params(top_k=1),
        params(min_p=1.0),
        params(temperature=2e-5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges_that_mean_the_most_likely_token(
    kernels: SampleOps, setting: SamplingParams, dtype: torch.dtype
) -> None:
    logits = random_logits().to(dtype)
    logits[0, 40] = logits[0, 150] = 9.0
    if setting.min_p == 1.0 or setting.temperature == 2e-5:
        logits[0, 150] = 8.0
    assert {one(kernels, logits, state(setting, index=i)) for i in range(20)} == {40}


@pytest.mark.parametrize("temperature", [2e-5, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("offset", [-3e4, 0.0, 3e4])
def test_extreme_logits_and_temperatures_still_draw(
    kernels: SampleOps, temperature: float, offset: float
) -> None:
    logits = random_logits(scale=30.0) + offset
    logits[0, ::2] = -math.inf
    setting = params(temperature=temperature)
    drawn = {one(kernels, logits, state(setting, index=i)) for i in range(50)}
    assert all(token % 2 for token in drawn)
    likely = token_probabilities(logits[0].numpy(), params(temperature=temperature * 1.01))
    assert all(likely[token] > 1e-6 for token in drawn)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("setting", [params(), params(temperature=0.0), params(top_k=3)])
def test_a_broken_row_fails_alone(kernels: SampleOps, bad: float, setting: SamplingParams) -> None:
    logits = random_logits(3)
    logits[1, 77] = bad
    result = Sampler(VOCAB, kernels).sample(logits, [state(setting) for _ in range(3)])
    assert result.token_ids[1] == -1
    assert result.scores[1] is None
    assert "not a number" in str(result.errors[1])
    assert result.errors[0] is None
    assert result.errors[2] is None
    assert one(kernels, logits[:1], state(setting)) == result.token_ids[0]


def test_nothing_left_to_choose_is_an_error(kernels: SampleOps) -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, EOS] = 1.0
    result = Sampler(VOCAB, kernels).sample(logits, [state(params(min_tokens=1))])
    assert "min_tokens" in str(result.errors[0])


def test_float16_logits_are_refused(kernels: SampleOps) -> None:
    with pytest.raises(EngineError, match="float16"):
        Sampler(VOCAB, kernels).sample(random_logits().half(), [state(params())])


def test_min_tokens_holds_back_end_and_stop_tokens(kernels: SampleOps) -> None:
    logits = random_logits()
    logits[0, EOS], logits[0, 9], logits[0, 60] = 50.0, 40.0, 30.0
    sampling = state(params(temperature=0.0, min_tokens=2, stop_token_ids=(9,)))
    tokens = []
    for _ in range(3):
        tokens.append(one(kernels, logits, sampling))
        sampling.accept(tokens[-1])
    assert tokens == [60, 60, EOS]
    ignoring = state(params(temperature=0.0, min_tokens=2, stop_token_ids=(9,), ignore_eos=True))
    assert one(kernels, logits, ignoring) == EOS


def test_penalties_and_bias_follow_the_oracle(kernels: SampleOps) -> None:
    setting = params(
        temperature=0.0,
        repetition_penalty=1.4,
        presence_penalty=0.7,
        frequency_penalty=0.9,
        logit_bias=((5, 2.5), (6, -100.0)),
    )
    prompt, logits = [1, 2, 2, 100], random_logits(vocab=VOCAB)
    logits[0, 6] = 30.0
    sampling = state(setting, prompt=tuple(prompt))
    output: list[int] = []
    before = logits.clone()
    for _ in range(100):
        expected = edited_logits(logits[0].numpy(), setting, prompt, output)
        token = one(kernels, logits, sampling)
        assert token == int(expected.argmax())
        sampling.accept(token)
        output.append(token)
    assert torch.equal(before, logits)
    assert len(set(output)) > 10


def test_bias_can_force_a_token_and_names_its_field_when_out_of_range(kernels: SampleOps) -> None:
    assert one(kernels, random_logits(), state(params(logit_bias=((42, 1000.0),)))) == 42
    with pytest.raises(InvalidRequest, match="logit_bias") as caught:
        state(params(logit_bias=((VOCAB, 1.0),)))
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_of_the_models_own_distribution(kernels: SampleOps, dtype: torch.dtype) -> None:
    logits = random_logits().to(dtype)
    setting = params(temperature=0.1, logit_bias=((42, 1000.0),), logprobs=5)
    scores = Sampler(VOCAB, kernels).sample(logits, [state(setting)]).scores[0]
    reference = torch.log_softmax(logits[0].double(), -1)
    best = reference.topk(5)
    assert scores is not None
    assert scores.token_id == 42
    assert scores.logprob == pytest.approx(float(reference[42]), abs=1e-5)
    assert [i for i, _ in scores.top] == best.indices.tolist()
    assert [value for _, value in scores.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_scores_of_known_tokens_and_ties_by_lowest_id(kernels: SampleOps) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, 7] = 1.0
    first, second = Sampler(VOCAB, kernels).score(logits, [9, 9], 3)
    assert [i for i, _ in first.top] == [0, 1, 2]
    assert [i for i, _ in second.top] == [7, 0, 1]
    assert first.logprob == pytest.approx(-math.log(VOCAB))
    assert Sampler(VOCAB, kernels).score(logits, [9], 0)[0].top == ()


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 151_936])
@pytest.mark.parametrize("setting", [params(top_p=0.9), params(top_k=5), params(top_k=100_000)])
def test_any_vocabulary_size(kernels: SampleOps, vocab: int, setting: SamplingParams) -> None:
    logits = random_logits(vocab=vocab)
    token = one(kernels, logits, state(setting, vocab=vocab))
    assert token_probabilities(logits[0].numpy(), setting)[token] > 0.0
