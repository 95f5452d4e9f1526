"""A timed request says when what happened to it, in both engines; a whole one waits its prefill."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from kvkeep.engine.api import Handover
from kvkeep.engine.engine import Output
from tests.disagg.pairs import answer, answers, engine_options, pair_of, until
from tests.disagg.test_handover import PROMPTS, SOME, alone
from tests.engines import request, tokens

TIMED = msgspec.structs.replace(request(PROMPTS[3], SOME), timed=True)


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
async def test_moments_are_in_the_order_in_which_things_happen(
    tiny: dict[str, Path], kv: str
) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off", kv=kv)) as pair:
        sent = time.monotonic()
        chunks = await answer(pair.client.submit(TIMED))
        ended = time.monotonic()
        assert not any(chunk.moments for chunk in chunks[:-1])
        there, here = chunks[-1].moments
        order = (sent, there.arrived_s, there.begun_s, there.first_token_s, there.ended_s)
        assert list(order) == sorted(order)  # type: ignore[type-var]
        assert here.received_s is not None
        after = (sent, here.arrived_s, here.received_s, here.installed_s, here.resumed_s)
        assert list(after) == sorted(after)  # type: ignore[type-var]
        assert here.resumed_s is not None
        assert there.begun_s is not None
        assert here.begun_s == here.resumed_s < here.ended_s < ended
        assert (here.first_token_s or 0.0) >= (there.first_token_s or 0.0)
        assert here.received_pages == pair.receives.installed_pages
        (outlet,) = pair.sends.outlets
        sent_bytes = here.received_bytes + here.received_rows_bytes
        assert sent_bytes == outlet.stats.sent_pages_bytes
        assert min(here.received_bytes, here.received_rows_bytes) > 0
        assert (there.encode_s > 0) == (kv != "bf16")
        assert there.encode_s < there.ended_s - there.begun_s
        assert there.received_s is None


async def test_nobody_is_told_who_does_not_ask(tiny: dict[str, Path]) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        asked = msgspec.structs.replace(TIMED, timed=False)
        chunks = await answer(pair.client.submit(asked))
        assert not any(chunk.moments for chunk in chunks)


async def test_a_short_prompt_has_the_moments_of_one_engine(tiny: dict[str, Path]) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), least_tokens=600) as pair:
        (own,) = (await answer(pair.client.submit(TIMED)))[-1].moments
        assert own.received_s is None
        order = (own.arrived_s, own.begun_s, own.first_token_s, own.resumed_s, own.ended_s)
        assert list(order) == sorted(order)  # type: ignore[type-var]


@pytest.mark.parametrize("whole", [False, True])
async def test_a_whole_prompt_is_computed_before_anything_of_it_is_sent(
    tiny: dict[str, Path], *, whole: bool
) -> None:
    engine = engine_options(tiny["qwen2"], shield="off", chunk_tokens=64, max_num_batched_tokens=64)
    async with pair_of(engine, whole=whole) as pair:
        handed: list[int] = []
        told: list[Output] = []
        step = pair.prefill.core.step

        def watched() -> list[Output]:
            """Take a step, from when the prompt was asked for on."""
            if not (pair.sends.pending or handed):
                time.sleep(0.001)
                return []
            told.extend(outputs := step())
            if not told:
                outlets = pair.sends.outlets
                handed.append(sum(o.stats.sent_pages_bytes + o.queued_bytes for o in outlets))
            return outputs

        pair.prefill.core.step = watched  # type: ignore[method-assign]
        (chunks,) = await answers(pair.client, TIMED)
        await pair.quiet()
        assert (max(handed) == 0) == whole
        assert len(handed) > 2
        assert pair.receives.installed_pages == 7
        assert tokens(chunks) == tokens(alone(tiny["qwen2"], SOME)[3])


async def test_a_prompt_that_is_asked_for_late_is_still_known(tiny: dict[str, Path]) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        prefill, decode = pair.client._prefill, pair.client._decode
        link = (await prefill.info()).link
        there = msgspec.structs.replace(TIMED, handover=Handover(role="prefill"))
        first = (await answer(prefill.submit(there)))[-1]
        await until(lambda: pair.sends._specs[TIMED.id][1] is not None)  # its end was noted
        pair.sends._clock = lambda: time.monotonic() + 100.0
        await answer(prefill.submit(request(PROMPTS[0], SOME, id="meanwhile")))
        here = msgspec.structs.replace(TIMED, handover=Handover(role="decode", link=link))
        stream = decode.submit(here)
        decode.begin(TIMED.id, first.token_ids, first.logprobs)
        chunks = await answer(stream)
        assert pair.receives.installed_pages == 7
        assert tokens(chunks) == tokens(alone(tiny["qwen2"], SOME)[3])[1:]
