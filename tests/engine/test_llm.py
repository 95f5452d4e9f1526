"""The Python API."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvkeep
from kvkeep.errors import ConfigError, EngineError, ModelNotFound


def test_generate_chat_and_close(tiny: dict[str, Path]) -> None:
    with kvkeep.LLM(str(tiny["qwen2"]), kv_cache_bytes=32 << 20, threads=1) as llm:
        first, second = llm.generate(["one two three", "four"], max_tokens=4, temperature=0.0)
        assert len(first.token_ids) <= 4
        assert first.prompt_tokens > second.prompt_tokens > 0
        again = llm.generate("one two three", max_tokens=4, temperature=0.0)[0]
        assert again.cached_tokens == again.prompt_tokens
        assert again.token_ids == first.token_ids
        answer = llm.chat([{"role": "user", "content": "hello"}], max_tokens=4)
        assert answer.prompt_tokens > 4


@pytest.mark.parametrize("kv", ["k8v8", "k2v2"])
def test_pages_in_fewer_bits(tiny: dict[str, Path], kv: str) -> None:
    prompt = "one two three " * 60
    with kvkeep.LLM(str(tiny["qwen2"]), kv_cache_bytes=32 << 20, threads=1, kv=kv) as llm:
        first = llm.generate(prompt, max_tokens=4, temperature=0.0)[0]
        again = llm.generate(prompt, max_tokens=4, temperature=0.0)[0]
        assert first.cached_tokens == 0
        assert 0 < again.cached_tokens == (again.prompt_tokens - 1) // 128 * 128
        assert again.token_ids == first.token_ids


def test_an_unknown_form_of_pages_is_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="kv: 'k3v3' is no form of pages"):
        kvkeep.LLM(str(tiny["qwen2"]), kv_cache_bytes=32 << 20, threads=1, kv="k3v3")


def test_beams_and_the_best_of_several(tiny: dict[str, Path]) -> None:
    with kvkeep.LLM(str(tiny["qwen2"]), kv_cache_bytes=32 << 20, threads=1) as llm:
        found = llm.beam_search(["one two three", "four"], beam_width=3, max_tokens=5)
        assert [len(beams) for beams in found] == [3, 3]
        scores = [beam.score or 0.0 for beam in found[0]]
        assert scores == sorted(scores, reverse=True)
        greedy = llm.beam_search("four", beam_width=1, max_tokens=5)[0][0]
        assert greedy.token_ids == llm.generate("four", max_tokens=5, temperature=0.0)[0].token_ids
        best, few = (llm.generate("four", max_tokens=5, seed=1, best_of=n)[0] for n in (8, 2))
        assert (best.score or 0.0) >= (few.score or 0.0)
        with pytest.raises(EngineError, match="temperature"):
            llm.beam_search("four", temperature=0.5)


async def test_the_async_engine_says_when_it_is_not_running(tiny: dict[str, Path]) -> None:
    engine = kvkeep.Engine(str(tiny["qwen2"]), kv_cache_bytes=32 << 20, threads=1)
    with pytest.raises(EngineError):
        await engine.generate("x")
    async with engine:
        assert (await engine.info()).num_pages > 0
        assert (await engine.stats()).requests_running == 0
        with pytest.raises(EngineError, match="prompt"):
            await engine.generate([])


def test_a_wrong_path_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        kvkeep.LLM(str(tmp_path / "none"))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError):
        kvkeep.Unknown  # noqa: B018
