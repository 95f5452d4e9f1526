"""The fault runs of `kvkeep bench disagg` on workers in threads: small, and with faults planted."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from bench import disagg_clients
from bench.disagg_clients import Plan, Question, Storm, Tokens, Told, events, is_wrong, questions
from bench.disagg_faults import FaultRun, fault_figures, fault_row
from bench.disagg_recovery import (
    WINDOW_S,
    Answer,
    Recoveries,
    Spells,
    recovered_s,
    recoveries,
    slower,
    usual_s,
)
from kvkeep.disagg import fleet as fleets
from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.journey import Journey
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import PaceOptions, Role
from kvkeep.disagg.outgoing import Outgoing
from kvkeep.engine.api import Chunk, EngineClient, FinishReason, GenerateRequest
from kvkeep.engine.client import MessageClient
from kvkeep.engine.engine import EngineCore, Output
from kvkeep.errors import EngineError
from kvkeep.sealing import Opened, SealContext
from kvkeep.shield.plain import PlainSealer
from tests.disagg.crews import KEY, QUICK_CREW, Hands
from tests.disagg.faulty import FaultyLink, faulty_link
from tests.disagg.pairs import QUICK, engine_options, held, until
from tests.engines import core_for, drive

LINK = msgspec.structs.replace(
    QUICK, silence_s=1.0, pace=PaceOptions(bytes_per_s=4e6, latency_s=0.001)
)
SMALL = Plan(
    requests=70,
    questions=12,
    kills=4,
    freezes=2,
    restarts=1,
    breaks=12,
    disguises=("version", "seal"),
    grace_s=30.0,
)
CALM = Plan(
    requests=24, questions=6, kills=0, freezes=0, restarts=0, breaks=0, disguises=(), hurried=0.0
)
FROZEN_S = 1.5
FEW = questions(CALM.questions, 3)
OTHER = {"version": {"kv": "k2v2"}, "seal": {"shield": "seal"}}
"""What differs of a worker in a thread: all of one process have one version, and seal nothing."""


class Threads:
    """A cluster of threads; a `Target`."""

    def __init__(self, hands: Hands, links: Sequence[FaultyLink], crew: CrewOptions) -> None:
        self.links = links
        self.hands = hands
        self._crew = crew
        self._up = asyncio.Event()
        self._leading: dict[str, asyncio.Future[None]] = {}
        self._masked: set[str] = set()
        """Workers that differ, until they were refused and are started as they should be."""

    def launch(self, name: str, role: Role) -> MessageClient:
        """Start a worker, in whose way its proxy is."""
        if name not in self.hands.others:
            self._masked.discard(name)
        proxy = self.links[int(name[-1])] if role == "prefill" else None
        if proxy is not None:
            self.hands.link = msgspec.structs.replace(LINK, advertise=proxy.address)
        client = self.hands(name, role)
        self._leading[name] = asyncio.ensure_future(self._lead(client, name, proxy))
        return client

    async def _lead(self, client: MessageClient, name: str, proxy: FaultyLink | None) -> None:
        """Have its proxy lead to a worker that has started; one that differs has told so."""
        worker = self.hands.workers[name]
        try:
            await client.info()
        except EngineError:
            return
        self.hands.others.pop(name, None)
        if proxy is not None:
            proxy.target = worker.side.address  # type: ignore[union-attr]

    async def start(self) -> None:
        """Start a router and its workers."""
        self.fleet = await Fleet.start(self.launch, self._crew, KEY)
        await self.fleet.set_tenants({"a": 0.5, "b": 0.5})
        self._up.set()

    async def client(self) -> EngineClient:
        await self._up.wait()
        return self.fleet

    async def kill(self, draw: random.Random, *, freeze: bool = False) -> None:
        if freeze:
            self._freeze(draw)
        else:
            self.hands.kill(self._any(draw))

    def _freeze(self, draw: random.Random) -> None:
        """Have a worker's next step last long."""
        for worker in draw.sample(alive := self.hands.alive(), min(1, len(alive))):
            core, step = worker.core, worker.core.step

            def frozen(core: EngineCore = core, step: Callable[[], list[Output]] = step) -> Any:
                core.step = step  # type: ignore[method-assign]
                time.sleep(FROZEN_S)
                return step()

            core.step = frozen  # type: ignore[method-assign]

    async def restart(self) -> None:
        self._up.clear()
        for name in self.hands.transports:
            self.hands.kill(name)
        await self.fleet.close()
        await self.start()

    async def disguise(self, draw: random.Random, what: Literal["version", "seal"]) -> None:
        name = self._any(draw)
        self._masked.add(name)
        self.hands.others[name] = msgspec.structs.replace(self.hands.engine, **OTHER[what])
        self.hands.kill(name)
        await until(lambda: name not in self._masked, 60)

    def _any(self, draw: random.Random) -> str:
        """Return a worker that does not differ: who is killed before it is refused says nothing."""
        return draw.choice(sorted(self.hands.transports.keys() - self._masked))

    async def held(self) -> Mapping[str, int]:
        return {str(at): len(held(worker)) for at, worker in enumerate(self.hands.alive())}


@asynccontextmanager
async def threads(model: Path, **crew: Any) -> AsyncIterator[Threads]:
    options = msgspec.structs.replace(QUICK_CREW, **crew)
    async with AsyncExitStack() as stack:
        links = [await stack.enter_async_context(faulty_link()) for _ in range(options.prefill)]
        target = Threads(Hands(engine_options(model, shield="off")), links, options)
        await target.start()
        try:
            yield target
        finally:
            await target.fleet.close()


def right(model: Path, asked: Sequence[Question]) -> list[Tokens]:
    """Return one engine's answers."""
    core = core_for(model, chunk_tokens=128, threads=1)
    told = drive(core, [one.request(str(number), None) for number, one in enumerate(asked)])
    found: list[Tokens] = []
    for number, one in enumerate(asked):
        chunks = told[str(number)]
        found.append(
            {
                index: [t for chunk in chunks if chunk.index == index for t in chunk.token_ids]
                for index in range(one.params.n)
            }
        )
    return found


async def calm(target: Threads, model: Path) -> Told:
    return await Storm(target, CALM, FEW, right(model, FEW)).run(1)


@pytest.mark.timeout(120)
async def test_whatever_fails_clients_are_told_what_is_right_and_nothing_stays_held(
    tiny: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = questions(SMALL.questions, 5)
    async with threads(tiny["qwen2"]) as target:
        told = await Storm(target, SMALL, asked, right(tiny["qwen2"], asked)).run(2)
        for what in ("kv", "shield"):
            await until(lambda: f"can't be started: {what}: worker" in caplog.text, 60)  # noqa: B023
    assert told.ends["hung"] == 0
    assert told.wrong == 0
    assert told.leaked == {}
    assert sum(told.ends.values()) == SMALL.requests
    assert min(told.ends["answered"], told.ends["left"]) > SMALL.requests // 4
    happened = {"kill": 4, "freeze": 2, "restart": 1, "break": 12, "version": 1, "seal": 1}
    assert told.events == happened
    assert sum(link.connections for link in target.links) > 0


class Credulous(PlainSealer):
    """Opens everything: what was changed on the way is installed."""

    def open(
        self,
        context: SealContext,
        frame: memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> Opened:
        for layer in super().open(context, frame, layer_bytes, into):
            yield memoryview(bytes(byte ^ 0x01 for byte in layer))
        return False


async def test_a_changed_page_that_is_taken_is_seen(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvkeep.engine.sealers.PlainSealer", Credulous)
    async with threads(tiny["qwen2"], prefill=1, decode=1) as target:
        told = await calm(target, tiny["qwen2"])
    assert told.wrong > 0


async def test_pages_that_nobody_lets_go_of_are_seen(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disagg_clients, "SETTLE_S", 0.5)
    monkeypatch.setattr(Outgoing, "release", lambda _: None)
    async with threads(tiny["qwen2"], prefill=1, decode=1) as target:
        told = await calm(target, tiny["qwen2"])
    assert sum(told.leaked.values()) > 0


async def test_a_client_that_hears_nothing_is_seen(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Journey):
        async def __anext__(self) -> Any:
            await asyncio.Event().wait()

    monkeypatch.setattr(fleets, "Journey", Silent)
    plan = Plan(
        requests=2, clients=2, questions=6, kills=0, freezes=0, restarts=0, breaks=0,
        disguises=(), deadline_s=0.1, grace_s=0.2, hurried=0.0,
    )  # fmt: skip
    async with threads(tiny["qwen2"], prefill=1, decode=1) as target:
        told = await Storm(target, plan, FEW, [{0: [], 1: []}] * len(FEW)).run(1)
    assert told.ends["hung"] >= 1


def test_what_was_told_must_be_a_beginning_or_all() -> None:
    whole = {0: [1, 2, 3]}
    assert not is_wrong({0: [1, 2]}, whole, whole=False)
    assert is_wrong({0: [1, 2]}, whole, whole=True)
    assert is_wrong({0: [1, 9]}, whole, whole=False)
    assert is_wrong({0: [1, 2, 3, 4]}, whole, whole=False)
    assert not is_wrong({}, whole, whole=False)


def test_what_happens_is_drawn_from_the_seed() -> None:
    first, again, other = (events(SMALL, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [at for at, _ in first] == sorted(at for at, _ in first)
    assert first[-1][0] < SMALL.requests


TOOK = {0: 0.1, 1: 1.0}
"""What two questions usually take."""


def asked_for(begin_s: float, end_s: float, slower: float = 1.0) -> list[Answer]:
    """Return what a client gets that asks both in turn, each so many times slower."""
    found: list[Answer] = []
    while begin_s < end_s:
        question = len(found) % 2
        found.append(Answer(question, begin_s, begin_s + slower * TOOK[question]))
        begin_s = found[-1].ended_s
    return found


def test_recovery_is_from_when_on_no_window_is_slow() -> None:
    before, after = asked_for(0.0, 20.0), asked_for(40.0, 80.0)
    assert usual_s(before) == pytest.approx(TOOK)
    usual = [*before, *asked_for(20.0, 40.0), *after]
    assert recovered_s(usual, TOOK, 20.0) == 0.0, "one question takes longer than another"
    slow = [*before, *asked_for(20.0, 40.0, 2.0), *after]
    assert 20.0 < recovered_s(slow, TOOK, 20.0) < 20.0 + WINDOW_S
    never = [*before, *asked_for(20.0, 80.0, 2.0)]
    assert recovered_s(never, TOOK, 20.0) >= 60.0
    always = [*asked_for(0.0, 20.0, 2.0), *asked_for(20.0, 80.0, 2.0)]
    assert recovered_s(always, TOOK, 20.0) == 0.0, "all was slow before: `before` says so"
    assert np.median(slower(always, TOOK)) == pytest.approx(2.0)


@pytest.mark.parametrize("clients", [1, 3])
def test_a_stall_counts_for_as_long_as_it_lasts(clients: int) -> None:
    """Few answers end while clients wait, and none of them tells of anybody else's."""
    before, after = asked_for(0.0, 20.0), asked_for(45.0, 80.0)
    stalled = [Answer(0, 20.0, 45.0)]
    found = recovered_s([*before, *clients * stalled, *clients * after], TOOK, 20.0)
    assert 25.0 <= found < 25.0 + WINDOW_S
    assert recovered_s([*before, *clients * stalled], TOOK, 20.0) >= 25.0, "nothing comes after"
    hardly = [*before, *asked_for(20.0, 21.0, 2.0)]
    assert recovered_s(hardly, TOOK, 20.0) > 0.0, "shorter than a window"


def test_a_slow_answer_among_many_is_chance() -> None:
    usual = asked_for(0.0, 80.0)
    found = recovered_s([*usual, *usual, Answer(0, 50.0, 51.0)], TOOK, 20.0)
    assert found == 0.0


class Quick:
    """A `Target` of `bench.disagg_recovery` that answers at once and is whole once it is told."""

    def __init__(self, away_s: float = 0.1) -> None:
        self.away_s = away_s
        self.killed = 0
        self.answers = 0
        self.again = asyncio.Event()
        self.again.set()

    async def client(self) -> Any:
        return self

    async def submit(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        await asyncio.sleep(0.005)
        self.answers += 1
        yield Chunk(token_ids=(1,), finish=FinishReason.LENGTH)

    async def kill(self, draw: random.Random) -> None:
        self.killed += 1
        self.again.clear()
        asyncio.get_running_loop().call_later(self.away_s, self.again.set)

    async def whole(self) -> None:
        await self.again.wait()
        self.before = self.answers


async def test_a_quick_watch_ends_once_all_serve_again_and_not_before() -> None:
    target = Quick()
    spells = Spells(1, 2, 0.05, 1000.0, ends_early=True)
    found = await recoveries(target, FEW, spells, random.Random(1))
    assert (target.killed, len(found.killed_s), len(found.unhurt_s)) == (1, 1, 2)
    assert target.answers > target.before > 0, "watched after that too"


async def test_who_is_slow_for_as_long_as_a_worker_is_away_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.disagg_recovery.WINDOW_S", 0.2)
    monkeypatch.setattr("bench.disagg_recovery.STEP_S", 0.02)
    monkeypatch.setattr("bench.disagg_recovery.SLOWER", 3.0)

    class Slower(Quick):
        async def submit(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
            await asyncio.sleep(0.02 if self.again.is_set() else 0.2)
            async for chunk in super().submit(request):
                yield chunk

    found = await recoveries(Slower(0.5), FEW, Spells(2, 0, 0.2, 1.5), random.Random(1))
    assert all(0.3 < took < 1.2 for took in found.killed_s), found


def test_figures_are_counts_of_all_requests() -> None:
    run = FaultRun(
        requests=500, ends={"answered": 240, "left": 250, "error": 10}, events={"kill": 10},
        refused={"version": 1, "shield": 1}, hung=0, wrong=1, leaked_pages=0, late_s=-0.5,
        recovered=Recoveries((4.0,) * 10, (0.0,) * 5, (1.25,) * 15),
    )  # fmt: skip
    figures = {one.name: one.row() for one in fault_figures(run)}
    assert [figures[name]["status"] for name in ("hung_clients", "leaked_pages")] == ["shown"] * 2
    assert figures["wrong_tokens"]["status"] == "missed"
    assert (figures["recovered_s"]["median"], figures["recovered_s"]["status"]) == (4.0, "shown")
    assert figures["slower_between_kills"]["median"] == 1.25
    assert (figures["recovered_s_unhurt"]["median"], figures["recovered_s_unhurt"]["goal"]) == (
        0,
        None,
    )
    assert fault_row(run)["answered_requests"] == 240
