"""A codec that is broken on one worker takes those who meet it back, on every worker."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions
from kvkeep.engine.api import Chunk, SamplingParams
from kvkeep.engine.choosing import KEPT
from kvkeep.sharing.state import FileStore
from tests.disagg.crews import KEY
from tests.disagg.faulty_codec import launch
from tests.disagg.pairs import answer, engine_options
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

FAULTY: Final = "decode-0"
DRAWN = SamplingParams(max_tokens=8, temperature=1.0, seed=7, ignore_eos=True)
SHARE: Final = 0.15
"""Of tenant a's first four requests the second and the third are sampled."""
GUARD = {"kv": "k8v8", "guard_share": SHARE, "guard_samples": 1, "guard_led": True}


def meets(fleet: Fleet, tenant: str, worker: str) -> list[list[int]]:
    """Return four prompts of a tenant that are answered by a worker."""
    found: list[list[int]] = []
    seed = 0
    while len(found) < 4:
        prompt = prompt_of(200, seed)
        if fleet.crew.find("decode", tenant, prompt).name == worker:
            found.append(prompt)
        seed += 1
    return found


async def told(fleet: Fleet, tenant: str, prompts: list[list[int]]) -> list[list[Chunk]]:
    found = []
    for i, prompt in enumerate(prompts):
        asked = request(prompt, DRAWN, id=f"{tenant}{i}", tenant=tenant)
        found.append(await asyncio.wait_for(answer(fleet.submit(asked)), 120))
    return found


@pytest.mark.timeout(240)
async def test_a_codec_that_is_broken_on_one_worker_trips_the_tenants_that_meet_it(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    model, state = tiny["qwen2"], tmp_path / "guard"
    engine = engine_options(model, shield="off", **GUARD)
    leads = engine_options(model, **{**GUARD, "guard_state": str(state)})
    start = partial(launch, engine, LinkOptions(), FAULTY)
    crew = CrewOptions(prefill=1, decode=2, least_tokens=64, epoch_s=0.2)
    fleet = await Fleet.start(start, crew, KEY, guard=leads)
    try:
        await fleet.set_tenants({"a": 0.5, "b": 0.5})
        own, others = meets(fleet, "a", FAULTY), meets(fleet, "b", "decode-1")
        chunks = await told(fleet, "a", own)
        assert [one[-1].kv for one in chunks] == ["k8v8", "k8v8", "k8v8", KEPT]
        sound = await told(fleet, "b", [*others, *others])
        assert {one[-1].kv for one in sound} == {"k8v8"}, "who meets a sound worker stays"
        stats = await fleet.stats()
        used = {use.tenant: (use.shadowed, use.steps_back) for use in stats.guard}
        assert used["a"] == (2, 1)
        assert used["b"][1] == 0
        assert used["b"][0] > 0
        prefill = next(m for m in fleet.crew.members.values() if m.role == "prefill")
        forms = dict((await prefill.client.stats()).kv_chosen)
        assert forms[KEPT] == 1, "the prompt of the fourth was computed in the same form"
    finally:
        await fleet.close()
    plain = core_for(model, threads=1, chunk_tokens=128, kv="auto", kv_auto_tokens=10**6)
    kept = drive(plain, [request(own[3], DRAWN)])["r"]
    assert tokens(chunks[3]) == tokens(kept)
    assert FileStore(state).load() == b'{"a":1}'
