"""Prompts that another engine computes hold nobody up, and nobody takes what they wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvkeep.engine import messages as m
from kvkeep.engine.api import Chunk, FinishReason, GenerateRequest, Handover
from kvkeep.engine.build import default_parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions
from tests.e2e.test_composition import prompt_of
from tests.engines import GREEDY, core_for, drive, manager_of, request, tokens
from tests.toys import DelayedTier

LONG, OTHER = prompt_of(448, 1), prompt_of(384, 2)
SOME = msgspec.structs.replace(GREEDY, max_tokens=6, ignore_eos=True)


def handed(prompt: list[int], name: str) -> GenerateRequest:
    """Return a request whose prompt another engine computes."""
    part = Handover(role="decode", link="elsewhere", key=bytes(32))
    return msgspec.structs.replace(request(prompt, SOME, id=name), handover=part)


def stepped(core: EngineCore, steps: int = 40) -> dict[str, list[Chunk]]:
    """Return what so many steps tell."""
    told: dict[str, list[Chunk]] = {}
    for _ in range(steps):
        for output in core.step():
            told.setdefault(output.request_id, []).append(output.chunk)
    return told


def over(model: Path, tier: DelayedTier, **options: Any) -> EngineCore:
    """Return an engine whose pages go to a tier and come from it."""
    parts = default_parts(EngineOptions(model=str(model), **options))
    return core_for(model, parts=msgspec.structs.replace(parts, tier=tier), **options)


def computed(
    model: Path, tier: DelayedTier, *prompts: list[int], **options: Any
) -> list[list[int]]:
    """Fill the tier with prompts' pages; return the answers."""
    core = over(model, tier, **options)
    answers = []
    for number, prompt in enumerate(prompts):
        told = drive(core, [request(prompt, SOME, id=str(number))])[str(number)]
        answers.append(tokens(told))
        manager_of(core).evict_pages("a", 99)
    return answers


def rest(chunks: list[Chunk]) -> list[int]:
    """Return the tokens after the first one, which whoever computed the prompt tells."""
    return tokens(chunks)[-(SOME.max_tokens - 1) :]


def test_others_run_past_a_prompt_that_is_computed_elsewhere(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"])
    wanted = tokens(drive(core, [request(LONG, SOME, id="alone")])["alone"])
    manager_of(core).evict_pages("a", 99)
    core.submit(handed(LONG, "handed"))
    core.submit(request(OTHER, SOME, id="short"))
    told = stepped(core)
    assert told.keys() == {"short"}
    assert told["short"][-1].finish is FinishReason.LENGTH
    core.begin(m.Begin("handed", (wanted[0],), ()))
    assert rest(drive(core)["handed"]) == wanted[1:]


def test_a_prompt_that_begins_alike_waits_for_it(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"])
    core.submit(handed(LONG, "handed"))
    core.submit(request(LONG[:320] + OTHER[:64], SOME, id="alike"))
    core.submit(request(OTHER, SOME, id="other"))
    assert stepped(core).keys() == set()
    core.begin(m.Begin("handed", (), ()))
    told = drive(core)
    assert told.keys() == {"handed", "alike", "other"}
    assert told["alike"][-1].cached_tokens == 320


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
def test_all_blocks_of_a_prompt_that_is_computed_elsewhere_are_fetched(
    tiny: dict[str, Path], kv: str
) -> None:
    tier = DelayedTier(2)
    whole = prompt_of(256, 3)
    (wanted,) = computed(tiny["qwen2"], tier, whole, kv=kv)
    core = over(tiny["qwen2"], tier, kv=kv)
    core.submit(handed(whole, "handed"))
    stepped(core, 10)
    assert tier.fetched == 4
    core.begin(m.Begin("handed", (wanted[0],), ()))
    (told,) = drive(core).values()
    assert rest(told) == wanted[1:]
    # Nobody says what comes next: the last block's rows are computed after all.
    core.submit(handed(whole, "again"))
    core.begin(m.Begin("again", (), ()))
    (again,) = drive(core).values()
    assert tokens(again) == wanted


def test_pages_of_one_that_waits_make_way_for_one_that_has_its_own(tiny: dict[str, Path]) -> None:
    tier = DelayedTier(2)
    wanted = computed(tiny["qwen2"], tier, LONG, OTHER)
    page_bytes = manager_of(core_for(tiny["qwen2"])).pool.spec.page_bytes
    core = over(tiny["qwen2"], tier, kv_cache_bytes=26 * page_bytes)
    assert manager_of(core).stats().accounts["a"].quota_pages == 13
    core.submit(handed(LONG, "long"))
    core.submit(handed(OTHER, "other"))
    stepped(core, 10)
    assert tier.fetched == 7 + 6, "both prompts are there, and the share is full"
    for name, answer in zip(("long", "other"), wanted, strict=True):
        core.begin(m.Begin(name, (answer[0],), ()))
    told = drive(core)
    assert [rest(told[name]) for name in ("long", "other")] == [one[1:] for one in wanted]


def test_nobody_takes_the_room_that_an_earlier_one_waits_for(tiny: dict[str, Path]) -> None:
    tier = DelayedTier(2)
    long, short = prompt_of(640, 4), prompt_of(128, 5)
    (wanted, _) = computed(tiny["qwen2"], tier, long, short)
    page_bytes = manager_of(core_for(tiny["qwen2"])).pool.spec.page_bytes
    core = over(tiny["qwen2"], tier, kv_cache_bytes=26 * page_bytes)
    slow = msgspec.structs.replace(SOME, max_tokens=30)
    core.submit(request(prompt_of(256, 6), slow, id="running"))
    core.step()  # it has four of thirteen pages or five, and ten find no room
    core.submit(handed(long, "long"))
    core.submit(handed(short, "short"))
    stepped(core, 10)
    assert tier.fetched == 0
    stepped(core, 40)
    assert tier.fetched >= 10
    core.begin(m.Begin("long", (wanted[0],), ()))
    core.begin(m.Begin("short", (), ()))
    told = drive(core)
    assert rest(told["long"]) == wanted[1:]
    assert told["long"][-1].cached_tokens == 640


def test_pages_that_somebody_holds_are_waited_for(tiny: dict[str, Path]) -> None:
    page_bytes = manager_of(core_for(tiny["qwen2"])).pool.spec.page_bytes
    core = core_for(tiny["qwen2"], kv_cache_bytes=26 * page_bytes)
    drive(core, [request(LONG, SOME, id="first")])
    manager = manager_of(core)
    found = manager.match(np.array(LONG, np.int32), account="a", scope="scope-a")
    hold = manager.holds.take(found)
    core.submit(request(OTHER + OTHER[:64], SOME, id="next"))
    assert stepped(core, 20) == {}
    hold.end()
    assert len(tokens(drive(core)["next"])) == SOME.max_tokens


def test_pages_of_another_form_are_not_waited_for(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"], kv="auto", kv_auto_tokens=400)
    core.submit(handed(LONG, "coded"))
    core.submit(request(LONG[:320], SOME, id="as it is"))
    assert stepped(core).keys() == {"as it is"}
