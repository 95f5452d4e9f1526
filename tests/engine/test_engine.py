"""The core's contract: every request ends once, with a reason, and gives back what it held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.engine.api import Chunk, FinishReason, SamplingParams
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import SharingOptions
from tests.engines import core_for, drive, greedy_oracle, request, tokens

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def text(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(c.text for c in chunks if c.index == index)


@pytest.fixture(scope="module")
def shared(tiny: dict[str, Path]) -> EngineCore:
    return core_for(tiny["llama"], tenants={"a": 0.5, "b": 0.25, "small": 0.001})


@pytest.fixture
def core(shared: EngineCore) -> Iterator[EngineCore]:
    """Return the shared core; afterwards nothing may run and no page may be held."""
    yield shared
    assert shared.idle()
    stats = shared.stats()
    assert stats.requests_running == stats.requests_waiting == 0


def test_cancel_takes_effect_within_a_step(core: EngineCore) -> None:
    core.submit(request(prompt_of(50), SamplingParams(max_tokens=500, ignore_eos=True)))
    core.step()
    core.cancel("r")
    chunks = [o.chunk for o in core.step()]
    assert chunks[-1].finish is FinishReason.CANCELLED
    assert core.idle()
    core.cancel("unknown")


def test_a_deadline_ends_a_request(core: EngineCore) -> None:
    params = SamplingParams(max_tokens=100_000, ignore_eos=True)
    chunks = drive(core, [request(prompt_of(20), params, deadline_s=0.05)])["r"]
    assert chunks[-1].finish is FinishReason.DEADLINE


def test_several_sequences_share_one_prefill(core: EngineCore) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=4, ignore_eos=True)
    chunks = drive(core, [request(prompt_of(100, 1), params, id="n4")])["n4"]
    answers = [tuple(tokens(chunks, i)) for i in range(4)]
    assert [len(a) for a in answers] == [8] * 4
    assert len(set(answers)) > 1, "siblings draw differently"
    single = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    alone = drive(core, [request(prompt_of(100, 1), single, id="n1")])["n1"]
    assert tuple(tokens(alone)) == answers[0], "the first sibling equals the request for one"


def test_a_request_of_no_tokens_scores_its_prompt(core: EngineCore, tiny: dict[str, Path]) -> None:
    prompt = prompt_of(70, 4)
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    drive(core, [request(prompt, GREEDY, id="warm")])
    chunks = drive(core, [request(prompt, params)])["r"]
    assert len(chunks) == 1
    assert chunks[0].finish is FinishReason.LENGTH
    assert chunks[0].token_ids == ()
    scores = chunks[0].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert [s.token_id for s in scores[1:] if s] == prompt[1:]
    assert chunks[0].cached_tokens == 0, "a cached prompt has no logits to score"
    assert all(s.logprob <= s.top[0][2] for s in scores[1:] if s)


def test_stop_strings_cut_the_text_and_hide_their_tokens(core: EngineCore) -> None:
    prompt = prompt_of(30, 7)
    whole = text(drive(core, [request(prompt, GREEDY)])["r"])
    stop = whole[3:6]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, stop=(stop,))
    chunks = drive(core, [request(prompt, params)])["r"]
    assert text(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish is FinishReason.STOP
    assert chunks[-1].stop_match == stop


@pytest.mark.parametrize(
    ("prompt", "tenant", "word"),
    [
        ([], "a", "prompt"),
        ([10**6], "a", "vocabulary"),
        ([1] * 5000, "a", "room"),
        ([1], "x", "tenant"),
    ],
)
def test_what_can_never_run_ends_at_once(
    core: EngineCore, prompt: list[int], tenant: str, word: str
) -> None:
    chunks = drive(core, [request(prompt, GREEDY, tenant=tenant)])["r"]
    assert [c.finish for c in chunks] == [FinishReason.ERROR]
    assert word in (chunks[0].error or "")


def test_a_prompt_beyond_the_tenants_share_is_refused(core: EngineCore) -> None:
    chunks = drive(core, [request(prompt_of(600), GREEDY, tenant="small")])["r"]
    assert "share" in (chunks[0].error or "")


def test_an_answer_that_outgrows_its_share_ends_for_length(tiny: dict[str, Path]) -> None:
    probe = core_for(tiny["llama"])
    page_bytes = probe.info.bytes_per_token * 64
    core = core_for(tiny["llama"], tenants={"a": 1.0}, pages=3, page_bytes=page_bytes)
    params = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
    chunks = drive(core, [request(prompt_of(100), params)])["r"]
    assert chunks[-1].finish is FinishReason.LENGTH
    assert 64 < len(tokens(chunks)) <= 3 * 64 - 100 + 1


def test_removing_a_tenant_cancels_and_forgets_it(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["llama"], tenants={"a": 0.5, "b": 0.5})
    core.submit(
        request(prompt_of(200), SamplingParams(max_tokens=500, ignore_eos=True), tenant="b")
    )
    core.step()
    core.set_tenants({"a": 0.5})
    chunks = [o.chunk for o in core.step()]
    assert chunks[-1].finish is FinishReason.CANCELLED
    assert core.stats().pages_free == core.info.num_pages


def test_tenants_take_turns_and_keep_their_own_order(tiny: dict[str, Path]) -> None:
    core = core_for(
        tiny["llama"], tenants={"a": 0.5, "b": 0.5}, max_num_batched_tokens=64, chunk_tokens=64
    )
    first: dict[str, int] = {}
    for i in range(3):
        core.submit(request(prompt_of(256, i), GREEDY, id=f"a{i}"))
    core.submit(request(prompt_of(64, 9), GREEDY, id="b0", tenant="b"))
    steps = 0
    while not core.idle():
        for output in core.step():
            first.setdefault(output.request_id, steps)
        steps += 1
    assert first["b0"] < first["a0"] < first["a1"] < first["a2"]


def test_without_prefix_caching_nothing_is_reused(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["llama"], prefix_caching=False)
    for name in ("x", "y"):
        chunks = drive(core, [request(prompt_of(200), GREEDY, id=name)])[name]
        assert chunks[0].cached_tokens == 0


def test_share_all_reuses_across_tenants(tiny: dict[str, Path]) -> None:
    core = core_for(
        tiny["llama"], tenants={"a": 0.3, "b": 0.3}, share=SharingOptions(policy="share_all")
    )
    drive(core, [request(prompt_of(200), GREEDY, id="x")])
    chunks = drive(core, [request(prompt_of(200), GREEDY, id="y", tenant="b")])["y"]
    assert chunks[0].cached_tokens == 192


def test_no_tenant_reads_anothers_pages_or_another_scopes(core: EngineCore) -> None:
    drive(core, [request(prompt_of(200, 5), GREEDY, id="x")])
    for tenant, scope in (("b", None), ("b", "scope-a"), ("a", "other")):
        chunks = drive(core, [request(prompt_of(200, 5), GREEDY, tenant=tenant, scope=scope)])["r"]
        assert chunks[0].cached_tokens == 0


@pytest.mark.parametrize("kernel", ["portable", "avx2", "reference"])
def test_every_kernel_path_gives_the_oracles_tokens(tiny: dict[str, Path], kernel: str) -> None:
    prompt = prompt_of(90, 2)
    core = core_for(tiny["qwen3"], kernel=kernel)
    chunks = drive(core, [request(prompt, GREEDY)])["r"]
    assert tokens(chunks) == greedy_oracle(tiny["qwen3"], prompt, 8)


def test_broken_weights_end_the_sequence_with_a_clear_error(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["llama"])
    broken = torch.full((1, core.info.vocab_size), float("nan"))
    forward = core._runner._parts.model.forward
    core._runner._parts.model.forward = lambda *a: broken.expand(len(a[3]), -1)  # type: ignore[method-assign]
    chunks = drive(core, [request(prompt_of(5), GREEDY)])["r"]
    core._runner._parts.model.forward = forward  # type: ignore[method-assign]
    assert chunks[-1].finish is FinishReason.ERROR
    assert "weights" in (chunks[-1].error or "")


def test_each_sequence_samples_from_its_own_row_beside_rows_of_a_prompt(
    core: EngineCore,
) -> None:
    """Two siblings' first rows and one prompt's are as many as the step has."""
    several = SamplingParams(max_tokens=4, temperature=1.0, seed=3, n=2, ignore_eos=True)
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    asked = [request([9], scored, id="scored"), request(prompt_of(40, 5), several, id="n")]
    alone = drive(core, asked[1:])["n"]
    beside = drive(core, asked)["n"]
    assert [tokens(beside, i) for i in (0, 1)] == [tokens(alone, i) for i in (0, 1)]
