"""What `kvkeep generate` prints and raises."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvkeep.cli import run
from kvkeep.cli.generate import LOCAL, stream
from kvkeep.engine.api import Chunk, FinishReason, GenerateRequest, SamplingParams
from kvkeep.errors import EngineError
from tests.server.fakes import FakeEngine


def test_a_nonsensical_length_is_refused_before_anything_is_loaded() -> None:
    assert run(["generate", "Once", "--max-tokens", "0"]) == 2


async def test_a_completion_is_printed_as_it_comes_and_returned_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = FakeEngine(reply="wörld")
    params = SamplingParams(max_tokens=100, seed=3)
    assert await stream(engine, (1, 2), params) == "wörld"
    assert capsys.readouterr().out == "wörld\n"
    (request,) = engine.requests
    assert (request.tenant, request.scope) == (LOCAL, LOCAL)
    assert (request.prompt_ids, request.params) == ((1, 2), params)


@pytest.mark.parametrize("why", ["the step failed", None])
async def test_what_the_engine_fails_with_is_told(why: str | None) -> None:
    class Failing(FakeEngine):
        async def _speak(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
            yield Chunk(text="a")
            yield Chunk(finish=FinishReason.ERROR, error=why)

    with pytest.raises(EngineError, match=why or "without a reason"):
        await stream(Failing(), (1,), SamplingParams())
