"""Workers that Ray runs: real nodes on this machine, commands over Ray, pages over links."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.ray_cluster import check_links, joined
from kvkeep.disagg.workers import RayTransport
from kvkeep.engine.api import SamplingParams
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions
from tests.disagg.pairs import QUICK, answer, answers, engine_options, until
from tests.disagg.rays import ray_nodes
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


async def test_workers_on_two_nodes_answer_and_die_as_others_do(
    tiny: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = core_for(tiny["qwen2"], chunk_tokens=128, threads=1)
    wanted = tokens(drive(core, [request(PROMPT, DRAWN)])["r"])
    (token := tmp_path / "token").write_text("5" * 64)
    names = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with ray_nodes(2, names) as address, joined(address):
        check_links(QUICK)
        async with ray_fleet(tiny["qwen2"]) as fleet:
            assert len({actor["Address"]["NodeID"] for actor in actors().values()}) == 2
            (first,) = await answers(fleet, request(PROMPT, DRAWN, id="first"))
            assert tokens(first) == wanted
            uses = (await fleet.stats()).workers
            assert all(use.state == "serving" and use.pid for use in uses)

            stream = fleet.submit(request(PROMPT, DRAWN, id="second"))
            got = [await anext(stream), await anext(stream)]
            members = fleet.crew.members
            (used,) = [one for one in members.values() if one.role == "decode" and one.streams]
            os.kill(used.info.pid, signal.SIGKILL)
            got += await asyncio.wait_for(answer(stream), 120)
            assert tokens(got) == wanted
            assert f"worker {used.name} is lost" in caplog.text
            await until(lambda: members[used.name].starts == 2, 120)
            (again,) = await answers(fleet, request(PROMPT, DRAWN, id="third"))
            assert tokens(again) == wanted
            assert (await fleet.purge("a")).pages > 0


def actors() -> dict[str, Any]:
    """Return what Ray says of its actors."""
    state = import_module("ray._private.state")
    return dict(state.actors())
