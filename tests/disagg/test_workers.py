"""Workers that Ray runs: real nodes on this machine, commands over Ray, pages over links."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.disagg import workers
from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.places import Places
from kvkeep.disagg.ray_cluster import check_links, joined
from kvkeep.disagg.workers import RayTransport, WorkerActor
from kvkeep.engine import messages as m
from kvkeep.engine.api import SamplingParams
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions
from tests.disagg.pairs import QUICK, answer, answers, engine_options, until
from tests.disagg.rays import ray_nodes
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

DRAWN = SamplingParams(max_tokens=32, temperature=1.0, seed=7, ignore_eos=True)
PROMPT = prompt_of(400, 5)
LED = CrewOptions(prefill=1, decode=2, least_tokens=64, epoch_s=0.2, beat_s=0.2)


class FakeTransport:
    """Takes note of what is said to an engine."""

    def __init__(self) -> None:
        self.heard: list[m.Command] = []
        self.joined_s = 0.0

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        self.deliver = deliver

    def send(self, command: m.Command) -> None:
        self.heard.append(command)

    def join(self, timeout_s: float) -> None:
        self.joined_s = timeout_s


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTransport:
    transport = FakeTransport()
    monkeypatch.setattr(workers, "transport_of", lambda *_: transport)
    return transport


def actor(*, tls: bool) -> WorkerActor:
    engine, link = EngineOptions(model="m"), LinkOptions()
    return WorkerActor(
        "decode", msgspec.msgpack.encode(engine), msgspec.msgpack.encode(link), tls=tls
    )


def test_commands_that_overtake_each_other_are_put_in_order(fake: FakeTransport) -> None:
    worker = actor(tls=True)
    said = [m.Cancel(str(number)) for number in range(5)]
    for number in (2, 0, 1, 4, 3):
        worker.say(number, m.encode(said[number]))
    assert fake.heard == said


def test_replies_wait_until_they_are_asked_for(fake: FakeTransport) -> None:
    worker = actor(tls=True)
    told = (m.Stopped(), m.TenantsSet(None))
    for reply in told:
        fake.deliver(reply)
    assert [m.decode_reply(raw) for raw in worker.hear()] == list(told)
    threading.Timer(0.05, fake.deliver, (m.Stopped(),)).start()
    assert [m.decode_reply(raw) for raw in worker.hear()] == [m.Stopped()]
    worker.join(3.0)
    assert fake.joined_s == 3.0


def test_a_ray_worker_that_listens_everywhere_starts_no_engine_without_tls(
    fake: FakeTransport,
) -> None:
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        with pytest.raises(PermissionError, match=r"listens at 0\.0\.0\.0:") as refused:
            actor(tls=False)
        actor(tls=True)
    said = f"creation task\n  line\nPermissionError: {refused.value}\nmore"
    transport = RayTransport("w", "decode", EngineOptions(model="m"), LinkOptions(), Places())
    assert transport._failed(RuntimeError(said)) == m.Failed("ConfigError", str(refused.value))
    ended = transport._failed(RuntimeError("a secret"))
    assert ended == m.Failed("EngineStopped", "worker w ended (RuntimeError)")


def launch(
    engine: EngineOptions, link: LinkOptions, places: Places, name: str, role: Role
) -> MessageClient:
    return MessageClient(RayTransport(name, role, engine, link, places))


@asynccontextmanager
async def ray_fleet(model: Path, options: CrewOptions = LED) -> AsyncIterator[Fleet]:
    engine = engine_options(model, shield="off")
    fleet = await Fleet.start(partial(launch, engine, QUICK, Places()), options)
    try:
        await fleet.set_tenants({"a": 0.5, "b": 0.5})
        yield fleet
    finally:
        await fleet.close()


@pytest.mark.ray
@pytest.mark.timeout(300)
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
