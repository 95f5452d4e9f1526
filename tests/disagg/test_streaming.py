"""Pages and rows leave while their prompt is computed, from its first step on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvkeep.disagg.inlet import Inlet
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


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
async def test_who_asks_while_a_step_computes_is_heard_within_it(
    tiny: dict[str, Path], kv: str
) -> None:
    """A prompt's first step begins before anyone can have asked, and may be its only one."""
    wanted = alone(tiny["qwen2"], SOME, kv=kv)
    engine = engine_options(tiny["qwen2"], shield="off", kv=kv, chunk_tokens=512)
    async with pair_of(engine) as pair:
        sends, begun = pair.sends, threading.Event()
        done: list[int] = []
        heard, closed, step = sends._heard, sends.layer_closed, pair.prefill.core.step

        def late(outlet: Any, event: Any) -> None:
            begun.wait(5.0)
            heard(outlet, event)

        def watched(page: Any, layer: int) -> None:
            if layer == 1 and not begun.is_set():
                begun.set()
                end = time.monotonic() + 5.0
                while len(sends._events) < 2 and time.monotonic() < end:
                    time.sleep(0.002)
            closed(page, layer)

        def stepped() -> list[Output]:
            outputs = step()
            done.extend(min(going._done) for going in sends._going.values())
            done.extend(rows.sent for rows in sends._rows._leaving.values())
            return outputs

        sends._heard, sends.layer_closed = late, watched  # type: ignore[method-assign]
        pair.prefill.core.step = stepped  # type: ignore[method-assign]
        (got,) = await answers(pair.client, request(PROMPTS[3], SOME, id="3"))
        assert tokens(got) == tokens(wanted[3])
        layers = pair.prefill.core.info.num_layers
        assert done[:2] == [layers, layers], "pages and rows, before anything but the step ran"
        await pair.quiet()


async def test_what_closed_before_anyone_asked_is_sent_behind_its_step(
    tiny: dict[str, Path],
) -> None:
    """The last of a step's pages closes while the wish is heard; the others' layers are past."""
    engine = engine_options(
        tiny["qwen2"], shield="off", chunk_tokens=256, max_num_batched_tokens=256
    )
    async with pair_of(engine) as pair:
        sends, begun = pair.sends, threading.Event()
        done: list[list[int]] = []
        heard, closed, step = sends._heard, sends.layer_closed, pair.prefill.core.step
        layers = pair.prefill.core.info.num_layers

        def late(outlet: Any, event: Any) -> None:
            begun.wait(5.0)
            heard(outlet, event)

        def watched(page: Any, layer: int) -> None:
            if (page.index, layer) == (3, layers - 1):
                begun.set()
                end = time.monotonic() + 5.0
                while len(sends._events) < 2 and time.monotonic() < end:
                    time.sleep(0.002)
            closed(page, layer)

        def stepped() -> list[Output]:
            done.extend(list(going._done) for going in sends._going.values())
            return step()

        sends._heard, sends.layer_closed = late, watched  # type: ignore[method-assign]
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
