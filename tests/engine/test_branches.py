"""Beams in an engine: equal to transformers' search, whatever else the engine does meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from kvkeep.engine.api import Chunk, FinishReason, SamplingParams
from kvkeep.engine.engine import EngineCore
from tests.engines import core_for, drive, oracle, request

LENGTH = 12
SAMPLED = SamplingParams(max_tokens=60, ignore_eos=True)


def prompt_of(length: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def beams(width: int, **changes: object) -> SamplingParams:
    fields = {"n": width, "max_tokens": LENGTH, "use_beam_search": True, "ignore_eos": True}
    return SamplingParams(**{**fields, **changes})  # type: ignore[arg-type]


def texts(chunks: Sequence[Chunk]) -> list[list[int]]:
    assert [c.index for c in chunks] == list(range(len(chunks)))
    return [list(c.token_ids) for c in chunks]


def theirs(path: Path, prompt: Sequence[int], params: SamplingParams) -> list[list[int]]:
    """Return what transformers' own beam search finds in float32, cut after an ending token."""
    ends = list(params.stop_token_ids)
    config = GenerationConfig(
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens or None,
        num_beams=params.width,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=ends or None,
    )
    with torch.inference_mode():
        found = oracle(path).generate(torch.tensor([list(prompt)]), generation_config=config)  # type: ignore[operator]
    answers = []
    for row in found[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


@pytest.fixture(scope="module")
def core(tiny: dict[str, Path]) -> EngineCore:
    return core_for(tiny["qwen2"], dtype="float32", tenants={"a": 0.4, "b": 0.4})


def likely(core: EngineCore, prompt: Sequence[int]) -> tuple[int, ...]:
    """Return three tokens that beams come upon after a few steps."""
    seen = [t for text in texts(drive(core, [request(prompt, beams(4))])["r"]) for t in text[4:]]
    return tuple(sorted(set(seen), key=lambda t: (-seen.count(t), t))[:3])


@pytest.mark.parametrize("width", [2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_texts_equal_those_of_transformers(
    core: EngineCore, tiny: dict[str, Path], width: int
) -> None:
    prompt = prompt_of(61 + width, width)
    ends = likely(core, prompt)
    lengths = set()
    for penalty in (-1.0, 0.0, 1.0, 2.0):
        for stop in ((), ends[:1], ends):
            params = beams(width, length_penalty=penalty, stop_token_ids=stop)
            found = texts(drive(core, [request(prompt, params)])["r"])
            assert found == theirs(tiny["qwen2"], prompt, params)
            lengths |= {len(text) for text in found}
    assert len(lengths) > 2, "some texts were ended by a token"


def test_best_of_is_the_width_and_a_shortest_length_is_kept(
    core: EngineCore, tiny: dict[str, Path]
) -> None:
    prompt = prompt_of(90, 3)
    params = beams(2, best_of=6, min_tokens=9, stop_token_ids=likely(core, prompt))
    chunks = drive(core, [request(prompt, params)])["r"]
    assert texts(chunks) == theirs(tiny["qwen2"], prompt, params)
    assert all(len(c.token_ids) > 9 for c in chunks)
    generated = sum(len(c.token_ids) + c.unsent_tokens for c in chunks)
    assert generated > 2 * LENGTH, "what other beams generated is counted"


def test_log_probabilities_add_up_to_the_score(core: EngineCore) -> None:
    params = beams(3, logprobs=2, prompt_logprobs=0)
    prompt = prompt_of(70, 4)
    chunks = drive(core, [request(prompt, params)])["r"]
    for chunk in chunks:
        assert chunk.score == pytest.approx(sum(t.logprob for t in chunk.logprobs) / LENGTH)
        assert [t.token_id for t in chunk.logprobs] == list(chunk.token_ids)
        assert all(len(t.top) == 2 for t in chunk.logprobs)
    assert [c.score for c in chunks] == sorted((c.score or 0.0 for c in chunks), reverse=True)
    assert len(chunks[0].prompt_logprobs or ()) == len(prompt)
    assert chunks[1].prompt_logprobs is None


def test_a_search_is_equal_among_strangers_and_when_cached(core: EngineCore) -> None:
    prompt, params = prompt_of(130, 5), beams(4)
    alone = texts(drive(core, [request(prompt, params)])["r"])
    others = [
        request(prompt_of(40 + 9 * i, i), SamplingParams(max_tokens=30, seed=i), id=f"s{i}")
        for i in range(5)
    ]
    stranger = request(prompt, params, id="b", tenant="b")
    together = drive(core, [*others, request(prompt, params), stranger])
    assert texts(together["r"]) == texts(together["b"]) == alone
    assert together["r"][0].cached_tokens > 0
    assert together["b"][0].cached_tokens == 0


def small(tiny: dict[str, Path], pages: int) -> EngineCore:
    """Return an engine whose only tenant holds `pages` pages."""
    model = core_for(tiny["qwen2"], dtype="float32", pages=8).info
    size = model.bytes_per_token * 64
    shares = {"a": 1.0}
    return core_for(tiny["qwen2"], dtype="float32", pages=pages, page_bytes=size, tenants=shares)


@pytest.mark.parametrize(
    "pages", [3, 5, *(pytest.param(pages, marks=pytest.mark.slow) for pages in (4, 6))]
)
def test_beams_that_do_not_fit_take_turns(
    core: EngineCore, tiny: dict[str, Path], pages: int
) -> None:
    """Prompt and answer need three pages; with four beams, up to nine."""
    prompt, params = prompt_of(120, 6), beams(4, max_tokens=40)
    wanted = texts(drive(core, [request(prompt, params)])["r"])
    tight = small(tiny, pages)
    chunks = drive(tight, [request(prompt, params)])["r"]
    assert texts(chunks) == wanted
    assert tight.stats().pages_used <= pages


def test_a_search_that_outgrows_its_quota_ends_with_what_it_has(tiny: dict[str, Path]) -> None:
    tight = small(tiny, 2)
    chunks = drive(tight, [request(prompt_of(120, 6), beams(2, max_tokens=40))])["r"]
    assert [c.finish for c in chunks] == [FinishReason.LENGTH] * 2
    assert all(0 < len(c.token_ids) < 40 for c in chunks)
    assert tight.idle()


def test_beams_preempted_by_others_go_on(core: EngineCore, tiny: dict[str, Path]) -> None:
    prompt, params = prompt_of(100, 7), beams(3, max_tokens=60)
    wanted = texts(drive(core, [request(prompt, params)])["r"])
    tight = small(tiny, 8)
    others = [request(prompt_of(60, i), replace(SAMPLED, seed=i), id=f"s{i}") for i in range(3)]
    chunks = drive(tight, [*others[:2], request(prompt, params), others[2]])
    assert tight.stats().preemptions_total > 0
    assert texts(chunks["r"]) == wanted


def test_full_pages_are_shared_and_dead_beams_leave_no_rows(
    core: EngineCore, tiny: dict[str, Path]
) -> None:
    """Eight beams on a prompt of 20 pages hold little more than one sequence does."""
    roomy = small(tiny, 64)
    used = []
    prompt = prompt_of(20 * 64 + 5, 8)

    def watch(_: int) -> None:
        used.append(roomy.stats().pages_used)

    drive(roomy, [request(prompt, beams(8, max_tokens=30))], watch)
    assert max(used) <= 20 + 8


def test_a_search_can_be_cancelled_and_has_a_deadline(core: EngineCore) -> None:
    core.submit(request(prompt_of(50, 1), beams(4, max_tokens=500)))
    for _ in range(3):
        core.step()
    core.cancel("r")
    chunks = [o.chunk for o in core.step()]
    assert [c.finish for c in chunks] == [FinishReason.CANCELLED] * 4
    assert core.idle()
    late = drive(core, [request(prompt_of(50, 1), beams(2, max_tokens=3000), deadline_s=0.05)])
    assert [c.finish for c in late["r"]] == [FinishReason.DEADLINE] * 2
    assert core.stats().requests_running == core.stats().requests_waiting == 0


def test_a_search_ends_at_the_models_length(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"], dtype="float32", max_model_len=64)
    chunks = drive(core, [request(prompt_of(60, 1), beams(3, max_tokens=50))])["r"]
    assert [len(c.token_ids) for c in chunks] == [4] * 3
    assert {c.finish for c in chunks} == {FinishReason.LENGTH}


def test_a_model_that_is_not_a_number_ends_the_request_once(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "nan"
    shutil.copytree(tiny["qwen2"], model)
    (weights,) = model.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, weights, {"format": "pt"})
    core = core_for(model, dtype="float32")
    chunks = drive(core, [request(prompt_of(50, 1), beams(3))])["r"]
    assert [c.finish for c in chunks] == [FinishReason.ERROR] * 3
    assert all("not a number" in (c.error or "") for c in chunks)
