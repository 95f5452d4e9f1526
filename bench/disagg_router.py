"""A cluster's router in a process of its own, with workers in theirs, all of which can be killed.

A file `NAME.version` or `NAME.seal` in the router's folder has the next worker of that name be one
that must not join: of another program's version, or one that seals nothing. It is taken once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec

from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.worker import run_worker
from kvkeep.engine import messages as m
from kvkeep.engine.api import Chunk, FinishReason, GenerateRequest
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.process import PipeTransport, run_loop
from kvkeep.errors import EngineError, KvkeepError

OLDER: Final = "kvkeep 0.0.0, wire 0"
LOG: Final = "router.log"


class Routed(msgspec.Struct, frozen=True, kw_only=True):
    """What a router is started with."""

    folder: str
    crew: CrewOptions
    engine: EngineOptions
    links: dict[str, LinkOptions]
    """Of each worker."""


class RouterTransport(PipeTransport):
    """Carries messages to a router; its workers end with it."""

    def __init__(self, routed: Routed) -> None:
        super().__init__(partial(run_router, msgspec.msgpack.encode(routed)))
        self._process.daemon = False  # it has children

    def kill(self) -> None:
        """End it as a machine's failure does."""
        self._process.kill()

    @property
    def pid(self) -> int:
        """Return its process."""
        return self._process.pid or 0


def run_router(raw: bytes, pipe: Connection) -> None:
    """Be a router at the end of a pipe."""
    routed = msgspec.msgpack.decode(raw, type=Routed)
    logging.basicConfig(filename=Path(routed.folder) / LOG, level=logging.WARNING)
    asyncio.run(Router(routed, pipe).run())
    os._exit(0)  # threads that wait for dead workers' replies are not waited for


def run_older(role: Role, engine: EngineOptions, link: LinkOptions, pipe: Connection) -> None:
    """Be a worker of another version at the end of a pipe."""
    from kvkeep.disagg.beside import (  # noqa: PLC0415 - torch loads in this process alone
        build_beside,
        side_of,
    )
    from kvkeep.disagg.decode import DecodeSide  # noqa: PLC0415 - as above
    from kvkeep.disagg.prefill import PrefillSide  # noqa: PLC0415 - as above
    from kvkeep.engine.engine import EngineCore  # noqa: PLC0415 - as above

    sides: list[PrefillSide | DecodeSide] = []

    def beside(inbox: m.Inbox) -> PrefillSide | DecodeSide:
        sides.append(side_of(role, engine, link, inbox))
        return sides[0]

    def build(reply: m.Sink) -> EngineCore:
        core = build_beside(engine, sides[0], reply)
        core.info = msgspec.structs.replace(core.info, version=OLDER)
        return core

    run_loop(engine, pipe, build, beside)


class Router:
    """A fleet, and who speaks with it over a pipe."""

    def __init__(self, routed: Routed, pipe: Connection) -> None:
        self._routed = routed
        self._pipe = pipe
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Start the workers, then serve until told to stop."""
        try:
            fleet = await Fleet.start(self._launch, self._routed.crew)
        except KvkeepError as error:
            self._say(m.Failed(type(error).__name__, str(error)))
            return
        self._say(m.Ready(await fleet.info()))
        inbox: asyncio.Queue[m.Command] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._hear, args=(loop, inbox), daemon=True).start()
        while not isinstance(command := await inbox.get(), m.Stop):
            self._take(fleet, command)
        await fleet.close()
        self._say(m.Stopped())

    def _hear(self, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[m.Command]) -> None:
        try:
            while True:
                command = m.decode_command(self._pipe.recv_bytes())
                loop.call_soon_threadsafe(inbox.put_nowait, command)
        except (EOFError, OSError):
            os._exit(0)  # nobody is left to answer

    def _take(self, fleet: Fleet, command: m.Command) -> None:
        match command:
            case m.Submit(request):
                self._requests[request.id] = self._start(self._answer(fleet, request))
            case m.Cancel(request_id):
                if request_id in self._requests:
                    self._requests[request_id].cancel()
            case m.GetStats():
                self._start(self._stats(fleet))
            case m.SetTenants(shares, terms):
                self._start(self._settle(fleet, m.SetTenants(shares, terms)))

    async def _answer(self, fleet: Fleet, request: GenerateRequest) -> None:
        try:
            stream = fleet.submit(request)
            try:
                async for chunk in stream:
                    self._say(m.Outputs(((request.id, chunk),)))
            finally:
                await stream.aclose()
        except EngineError as error:
            last = Chunk(finish=FinishReason.ERROR, error=str(error))
            self._say(m.Outputs(((request.id, last),)))
        finally:
            del self._requests[request.id]

    async def _stats(self, fleet: Fleet) -> None:
        self._say(m.Stats(await fleet.stats()))

    async def _settle(self, fleet: Fleet, asked: m.SetTenants) -> None:
        await fleet.set_tenants(asked.shares, asked.terms)
        self._say(m.TenantsSet(None))

    def _launch(self, name: str, role: Role) -> MessageClient:
        """Start a worker, or one in its place that must not join."""
        routed, engine = self._routed, self._routed.engine
        older = _taken(Path(routed.folder) / f"{name}.version")
        if _taken(Path(routed.folder) / f"{name}.seal"):
            engine = msgspec.structs.replace(engine, shield="off")
        arguments = (role, engine, routed.links[name])
        run = partial(run_older, *arguments) if older else partial(run_worker, *arguments)
        return MessageClient(PipeTransport(run))

    def _say(self, reply: m.Reply) -> None:
        try:
            self._pipe.send_bytes(m.encode(reply))
        except OSError:
            os._exit(0)  # as above

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _taken(file: Path) -> bool:
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True
