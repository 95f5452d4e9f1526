"""The part `faults` of `kvkeep bench disagg`: a cluster of processes in which everything fails.

A router, two prefill and two decode workers, each a process, pages sealed, links through a proxy
that stalls, drops and changes bytes. Workers and routers are killed, workers are stopped where they
stand (SIGSTOP), and some come back as ones that must not join. What each client is told is held
against one engine's answers.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

import msgspec

from bench.disagg_clients import (
    TENANTS,
    End,
    Event,
    Plan,
    Question,
    Storm,
    Tokens,
    questions,
    right_answers,
)
from bench.disagg_recovery import Recoveries, Spells, recoveries
from bench.disagg_router import LOG, Routed, RouterTransport
from bench.harness import Figure, Goal, Row, estimate, exactly
from kvkeep.cli.console import NOTES
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions, PaceOptions
from kvkeep.engine.api import EngineClient, WorkerUse
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.process import spawn_engine
from kvkeep.models import make
from tests.disagg.faulty import FaultyLink, faulty_link

CREW: Final = CrewOptions(
    prefill=2, decode=2, least_tokens=64, patience_s=20.0, epoch_s=0.5, beat_s=0.25, again_s=0.5,
    silence_s=5.0,
)  # fmt: skip
LINK: Final = LinkOptions(
    beat_s=0.1, silence_s=2.0, pace=PaceOptions(bytes_per_s=2e6, latency_s=0.002)
)
"""On it the longest prompt's pages take about a fifth of a second."""
REFUSED: Final = re.compile(
    r"can't be started: (version|shield): worker \S+ has ['\"].+['\"] and this .+['\"]"
)
SEED: Final = 7
WHOLE_S: Final = 120.0
"""What workers get to start again."""
LOOK_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked and killed."""

    plan: Plan
    spells: Spells
    """While everything else is whole."""


FULL: Final = Size(Plan(requests=500), Spells(10, 5, 5.0, 32.0))
QUICK: Final = Size(
    Plan(
        requests=40,
        questions=12,
        kills=1,
        freezes=1,
        restarts=1,
        breaks=6,
        disguises=("version", "seal"),
    ),
    Spells(1, 0, 2.0, 20.0, ends_early=True),
)


class FaultRun(msgspec.Struct, frozen=True, kw_only=True):
    """What came of all clients."""

    requests: int
    ends: dict[End, int]
    events: dict[Event, int]
    refused: dict[str, int]
    """Workers that were not let in, by what both values were named of."""
    hung: int
    wrong: int
    leaked_pages: int
    late_s: float
    recovered: Recoveries


class Processes:
    """A cluster of processes; a `Target`."""

    def __init__(self, routed: Routed, links: Sequence[FaultyLink]) -> None:
        self.links = links
        self._routed = routed
        self._up = asyncio.Event()
        self._hurt: set[int] = set()
        """Processes that are gone, or will be."""

    async def start(self) -> None:
        """Start a router and its workers."""
        self._transport = RouterTransport(self._routed)
        self._client = MessageClient(self._transport)
        await self._client.info()
        await self._client.set_tenants(dict.fromkeys(TENANTS, 1 / len(TENANTS)))
        self._up.set()

    async def client(self) -> EngineClient:
        """Return who answers now; waits while nobody does."""
        await self._up.wait()
        return self._client

    async def kill(self, draw: random.Random, *, freeze: bool = False) -> None:
        """Kill a worker, of those that start again some are; or stop it until it is given up."""
        workers = [one for one in await self._workers() if one.state != "lost"]
        if workers:
            what = signal.SIGSTOP if freeze else signal.SIGKILL
            self._signal(draw.choice(workers).pid, what)

    async def restart(self) -> None:
        """Kill the router, and start another on the same ports."""
        self._up.clear()
        self._transport.kill()
        await self._client.close()
        await self.start()

    async def disguise(self, draw: random.Random, what: Literal["version", "seal"]) -> None:
        """Kill a worker and have another come in its place that must not join."""
        folder = Path(self._routed.folder)
        async with asyncio.timeout(WHOLE_S):  # one that starts already is told nothing
            while not (serving := list(filter(self._serves, await self._workers()))):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)  # they are in another process
        worker = draw.choice(serving)
        before = len(refusals(folder))
        (folder / f"{worker.name}.{what}").touch()
        self._signal(worker.pid, signal.SIGKILL)
        async with asyncio.timeout(WHOLE_S):
            while len(refusals(folder)) == before:  # noqa: ASYNC110 - told in a file
                await asyncio.sleep(LOOK_S)

    async def held(self) -> Mapping[str, int]:
        """Return the pages that something holds on each worker that lives."""
        return {one.name: one.held_pages for one in await self._workers() if one.state != "lost"}

    async def close(self) -> None:
        """End the router and its workers."""
        await self._client.close()

    async def whole(self) -> None:
        """Wait until all workers serve, none of them one that was killed or stopped.

        Raises `TimeoutError`.
        """
        async with asyncio.timeout(WHOLE_S):
            while not all(map(self._serves, await self._workers())):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)  # they are in another process

    def _serves(self, worker: WorkerUse) -> bool:
        return worker.state == "serving" and worker.pid not in self._hurt

    def _signal(self, pid: int, what: signal.Signals) -> None:
        """Send a signal to a worker of the router; what has ended meanwhile is left alone."""
        self._hurt.add(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        if int(stat.rpartition(")")[2].split()[1]) == self._transport.pid:
            os.kill(pid, what)

    async def _workers(self) -> tuple[WorkerUse, ...]:
        return (await (await self.client()).stats()).workers


def refusals(folder: Path) -> list[str]:
    """Return of what both values were named of each worker that was not let in."""
    log = folder / LOG
    return REFUSED.findall(log.read_text(encoding="utf-8")) if log.exists() else []


async def fault_run(folder: Path, size: Size, seed: int = SEED) -> FaultRun:
    """Play everything; raises `RuntimeError` where nothing failed, since then nothing was shown."""
    model = make.tiny("qwen2", folder / "model", seed=0)
    engine = EngineOptions(
        model=str(model),
        threads=1,
        chunk_tokens=128,
        kv_cache_bytes=32 << 20,
        shield="seal",
    )
    asked = questions(size.plan.questions, seed)
    async with AsyncExitStack() as stack:
        names = [f"prefill-{number}" for number in range(CREW.prefill)]
        proxies = [await stack.enter_async_context(faulty_link()) for _ in names]
        links = {f"decode-{number}": LINK for number in range(CREW.decode)}
        for name, proxy, port in zip(names, proxies, _free_ports(len(names)), strict=True):
            proxy.target = f"tcp://127.0.0.1:{port}"
            links[name] = msgspec.structs.replace(
                LINK, listen=proxy.target, advertise=proxy.address
            )
        routed = Routed(folder=str(folder), crew=CREW, engine=engine, links=links)
        target = Processes(routed, proxies)
        stack.push_async_callback(target.close)
        right, _ = await asyncio.gather(_right(engine, asked), target.start())
        return await _played(target, size, asked, right, folder, seed)


async def _right(engine: EngineOptions, asked: Sequence[Question]) -> list[Tokens]:
    """Return what one engine answers that nothing happens to."""
    alone = spawn_engine(engine)
    await alone.info()
    await alone.set_tenants(dict.fromkeys(TENANTS, 1 / len(TENANTS)))
    right = await right_answers(alone, asked)
    await alone.close()
    return right


async def _played(
    target: Processes,
    size: Size,
    asked: Sequence[Question],
    right: Sequence[Tokens],
    folder: Path,
    seed: int,
) -> FaultRun:
    told = await Storm(target, size.plan, asked, right).run(seed)
    NOTES.print(f"faults: {dict(told.ends)}, {dict(told.events)}")
    await target.whole()
    recovered = await recoveries(target, asked, size.spells, random.Random(seed))
    found = refusals(folder)
    run = FaultRun(
        requests=size.plan.requests,
        ends=dict(told.ends),
        events=dict(told.events),
        refused={what: found.count(what) for what in ("version", "shield")},
        hung=told.ends["hung"],
        wrong=told.wrong,
        leaked_pages=sum(told.leaked.values()),
        late_s=told.late_s,
        recovered=recovered,
    )
    wanted = {"version": "version", "seal": "shield"}
    if not all(run.refused[wanted[what]] for what in size.plan.disguises):
        raise RuntimeError(f"a worker that must not join was not refused: {run.refused}")
    if not (run.ends.get("answered") and run.ends.get("left")):
        raise RuntimeError(f"nobody was answered, or nobody left: {run.ends}")
    return run


def _free_ports(number: int) -> list[int]:
    """Return ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def measure_faults(size: Size) -> FaultRun:
    """Play the part in a folder of its own."""
    with TemporaryDirectory() as folder:
        return asyncio.run(fault_run(Path(folder), size))


def fault_figures(run: FaultRun) -> list[Figure]:
    """Return what must be nothing, and how long requests took longer after a kill."""
    counts = {"hung_clients": run.hung, "wrong_tokens": run.wrong, "leaked_pages": run.leaked_pages}
    figures = [
        Figure(name, exactly(value, run.requests), Goal("<=", 0.0))
        for name, value in counts.items()
    ]
    killed, unhurt, before = run.recovered
    figures.append(Figure("recovered_s", estimate(killed), Goal("<=", 30.0)))
    if unhurt:
        figures.append(Figure("recovered_s_unhurt", estimate(unhurt)))
    return [*figures, Figure("slower_between_kills", estimate(before))]


def fault_row(run: FaultRun) -> Row:
    """Return what happened and how requests ended."""
    return {
        "part": "faults",
        "requests": run.requests,
        **{f"{name}_requests": run.ends.get(name, 0) for name in _ENDS},
        **{f"{name}_events": count for name, count in sorted(run.events.items())},
        **{f"refused_for_{name}": count for name, count in run.refused.items()},
        "latest_after_deadline_s": run.late_s,
    }


_ENDS: Final[tuple[End, ...]] = ("answered", "left", "deadline", "error", "hung")
