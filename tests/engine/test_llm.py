"""The Python API."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvkeep
from kvkeep.errors import EngineError, ModelNotFound


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
