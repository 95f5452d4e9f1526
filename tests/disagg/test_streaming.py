"""Pages and rows leave while their prompt is computed, from its first step on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvkeep.disagg.inlet import Inlet
from kvkeep.disagg.prefill import PrefillSide
from kvkeep.disagg.wire import WantRows
from kvkeep.engine.engine import Output
from tests.disagg.pairs import answers, engine_options, pair_of
from tests.disagg.test_handover import PROMPTS, SOME, alone
from tests.engines import request, tokens


async def test_pages_are_sent_while_their_prompt_is_still_computed(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"], shield="off", chunk_tokens=64, max_num_batched_tokens=64)
    async with pair_of(engine) as pair:
        before: list[int] = []
        step = pair.prefill.core.step

        def sent() -> int:
            return sum(outlet.stats.sent_pages_bytes for outlet in pair.sends.outlets)

        def watched() -> list[Output]:
            """Take a step, once what the one before it left to send is gone (or hangs)."""
            end = time.monotonic() + 0.5
            while before and sent() <= before[-1] and time.monotonic() < end:
                time.sleep(0.002)
            outputs = step()
            if not outputs:
                before.append(sent())
            return outputs

        pair.prefill.core.step = watched  # type: ignore[method-assign]
        await answers(pair.client, request(PROMPTS[3], SOME))
        await pair.quiet()
        assert len(set(before)) > 2, "in several frames, before the first token"


def heard_at(sends: PrefillSide, *, page: int, layer: int) -> None:
    """Hold a prompt's two wishes, for pages and rows, back until a step closes this layer."""
    heard, closed, begun = sends._heard, sends.layer_closed, threading.Event()

    def late(outlet: Any, event: Any) -> None:
        begun.wait(5.0)
        heard(outlet, event)

    def watched(one: Any, at: int) -> None:
        if (one.index, at) == (page, layer):
            begun.set()
            end = time.monotonic() + 5.0
            while len(sends._events) < 2 and time.monotonic() < end:
                time.sleep(0.002)
        closed(one, at)

    sends._heard = late  # type: ignore[method-assign]
    sends.layer_closed = watched  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
async def test_who_asks_while_a_step_computes_is_heard_within_it(
    tiny: dict[str, Path], kv: str
) -> None:
    """A prompt's first step begins before anyone can have asked, and may be its only one."""
    wanted = alone(tiny["qwen2"], SOME, kv=kv)
    engine = engine_options(tiny["qwen2"], shield="off", kv=kv, chunk_tokens=512)
    async with pair_of(engine) as pair:
        sends, step = pair.sends, pair.prefill.core.step
        done: list[int] = []
        heard_at(sends, page=0, layer=1)

        def stepped() -> list[Output]:
            outputs = step()
            done.extend(min(going._done) for going in sends._going.values())
            done.extend(rows.sent for rows in sends._rows._leaving.values())
            return outputs

        pair.prefill.core.step = stepped  # type: ignore[method-assign]
        (got,) = await answers(pair.client, request(PROMPTS[3], SOME, id="3"))
        assert tokens(got) == tokens(wanted[3])
        layers = pair.prefill.core.info.num_layers
        assert done[:2] == [layers, layers], "pages and rows, before anything but the step ran"
        await pair.quiet()


async def test_a_step_that_ends_no_prompt_hears_too(tiny: dict[str, Path]) -> None:
    """No rows leave in it: pages alone tell that it runs."""
    engine = engine_options(
        tiny["qwen2"], shield="off", chunk_tokens=256, max_num_batched_tokens=256
    )
    async with pair_of(engine) as pair:
        sends, step = pair.sends, pair.prefill.core.step
        done: list[list[int]] = []
        heard_at(sends, page=0, layer=1)

        def stepped() -> list[Output]:
            outputs = step()
            done.extend(list(going._done) for going in sends._going.values())
            return outputs

        pair.prefill.core.step = stepped  # type: ignore[method-assign]
        await answers(pair.client, request(PROMPTS[3], SOME))
        layers = pair.prefill.core.info.num_layers
        assert done[0] == [layers] * 4 + [0] * 3
        await pair.quiet()


async def test_a_step_that_closes_no_page_hears_too(tiny: dict[str, Path]) -> None:
    """All pages of the prompt are cached there: rows alone tell that it runs."""
    async with pair_of(engine_options(tiny["qwen2"], shield="off", chunk_tokens=512)) as pair:
        await answers(pair.client, request(PROMPTS[3], SOME, id="first"))
        await pair.quiet()
        for manager in pair.decode.core.caches.managers.values():
            manager.evict_pages("a", 99)
        sends, stored = pair.sends, pair.sends.rows_stored
        asked: list[Any] = []

        def watched(rows: Any, layer: int, data: bytes) -> None:
            end = time.monotonic() + 5.0
            while layer == 1 and not asked and not sends._events and time.monotonic() < end:
                time.sleep(0.002)
            stored(rows, layer, data)
            asked.extend(one.wishes for one in sends._rows._leaving.values() if one.wishes)

        sends.rows_stored = watched  # type: ignore[method-assign]
        await answers(pair.client, request(PROMPTS[3], SOME, id="again"))
        assert asked, "within the step"
        await pair.quiet()


async def test_what_closed_before_anyone_asked_is_sent_behind_its_step(
    tiny: dict[str, Path],
) -> None:
    """The last of a step's pages closes while the wish is heard; the others' layers are past."""
    engine = engine_options(
        tiny["qwen2"], shield="off", chunk_tokens=256, max_num_batched_tokens=256
    )
    async with pair_of(engine) as pair:
        sends, step = pair.sends, pair.prefill.core.step
        done: list[list[int]] = []
        layers = pair.prefill.core.info.num_layers
        heard_at(sends, page=3, layer=layers - 1)

        def stepped() -> list[Output]:
            done.extend(list(going._done) for going in sends._going.values())
            return step()

        pair.prefill.core.step = stepped  # type: ignore[method-assign]
        await answers(pair.client, request(PROMPTS[3], SOME))
        assert [layers] * 4 + [0] * 3 in done, "before its second step"
        await pair.quiet()


async def test_rows_are_known_before_they_are_asked_for(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may come at once, and what nobody knows of is taken for what was dropped."""
    say, asked = Inlet.say, []

    def watched(inlet: Inlet, record: Any) -> None:
        if isinstance(record, WantRows):
            asked.append(record.request in inlet.incoming)
        say(inlet, record)

    monkeypatch.setattr(Inlet, "say", watched)
    async with pair_of(engine_options(tiny["qwen2"], shield="off", kv="k2v2")) as pair:
        await answers(pair.client, request(PROMPTS[1], SOME))
        await pair.quiet()
    assert asked == [True]
