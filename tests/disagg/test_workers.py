"""Workers that Ray runs: real nodes on this machine, commands over Ray, pages over links."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.ray_cluster import AUTO, check_links, joined
from kvkeep.disagg.workers import RayTransport
from kvkeep.engine.api import SamplingParams
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions
from tests.disagg.pairs import QUICK, answer, answers, engine_options, until
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

DRAWN = SamplingParams(max_tokens=32, temperature=1.0, seed=7, ignore_eos=True)
PROMPT = prompt_of(400, 5)
LED = CrewOptions(prefill=1, decode=2, least_tokens=64, epoch_s=0.2, beat_s=0.2)


def launch(engine: EngineOptions, link: LinkOptions, name: str, role: Role) -> MessageClient:
    return MessageClient(RayTransport(name, role, engine, link))


@asynccontextmanager
async def ray_fleet(model: Path, options: CrewOptions = LED) -> AsyncIterator[Fleet]:
    engine = engine_options(model, shield="off")
    fleet = await Fleet.start(partial(launch, engine, QUICK), options)
    try:
        await fleet.set_tenants({"a": 0.5, "b": 0.5})
        yield fleet
    finally:
        await fleet.close()


async def test_workers_on_ray_answer_and_die_as_others_do(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    core = core_for(tiny["qwen2"], chunk_tokens=128, threads=1)
    wanted = tokens(drive(core, [request(PROMPT, DRAWN)])["r"])
    with joined(AUTO):
        check_links(QUICK)
        async with ray_fleet(tiny["qwen2"]) as fleet:
            (first,) = await answers(fleet, request(PROMPT, DRAWN, id="first"))
            assert tokens(first) == wanted
            uses = {use.name: use for use in (await fleet.stats()).workers}
            assert all(use.state == "serving" and use.pid for use in uses.values())

            stream = fleet.submit(request(PROMPT, DRAWN, id="second"))
            got = [await anext(stream), await anext(stream)]
            (used,) = [
                one for one in fleet.crew.members.values() if one.role == "decode" and one.streams
            ]
            os.kill(used.info.pid, signal.SIGKILL)
            got += await asyncio.wait_for(answer(stream), 120)
            assert tokens(got) == wanted
            assert f"worker {used.name} is lost" in caplog.text

            back = fleet.crew.members
            await until(
                lambda: back[used.name].starts == 2 and back[used.name].state == "serving", 120
            )
            await fleet.crew.restart("prefill-0")
            (again,) = await answers(fleet, request(PROMPT, DRAWN, id="third"))
            assert tokens(again) == wanted
            assert (await fleet.purge("a")).pages > 0
