"""A cluster's workers in threads of this process, each of which can be killed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.engine import messages as m
from kvkeep.engine.client import MessageClient
from kvkeep.engine.local import ThreadTransport
from kvkeep.engine.options import EngineOptions
from tests.disagg.pairs import QUICK, Worker, engine_options, held, until

KEY = bytes(range(32))
QUICK_CREW = CrewOptions(
    prefill=2, decode=2, least_tokens=64, patience_s=20.0, epoch_s=0.05, beat_s=0.1, again_s=0.05
)


class Mortal(ThreadTransport):
    """An engine in a thread that can die, and then neither hears nor says anything."""

    dead = False
    mute = False
    heard: Callable[[m.Command], None] = staticmethod(lambda _: None)

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        """Start, and tell what it says for as long as it lives."""
        self._tell = deliver
        super().start(lambda reply: None if self.dead or self.mute else deliver(reply))

    def send(self, command: m.Command) -> None:
        """Say something to it."""
        self.heard(command)
        if not self.dead or isinstance(command, m.Stop):
            super().send(command)

    def die(self) -> None:
        """Die as a process does."""
        if not self.dead:
            self.dead = True
            self._inbox.put(m.Stop())
            self._tell(m.Failed("EngineStopped", "the engine process ended"))


@dataclass
class Hands:
    """Starts workers, kills them, and looks inside."""

    engine: EngineOptions
    link: LinkOptions = QUICK
    others: dict[str, EngineOptions] = field(default_factory=dict)
    """Of workers that differ."""
    workers: dict[str, Worker] = field(default_factory=dict)
    transports: dict[str, Mortal] = field(default_factory=dict)

    def __call__(self, name: str, role: Role) -> MessageClient:
        """Start a worker."""
        worker = Worker(role, self.others.get(name, self.engine), self.link)
        self.workers[name] = worker
        self.transports[name] = transport = Mortal(worker._build, worker._beside)
        return MessageClient(transport)

    def kill(self, name: str) -> None:
        """Kill a worker."""
        self.transports[name].die()

    def kill_at_submit(self, name: str) -> None:
        """Kill a worker once it hears of a request."""
        transport = self.transports[name]

        def heard(command: m.Command) -> None:
            if isinstance(command, m.Submit):
                transport.die()

        transport.heard = heard

    def leaks(self) -> list[str]:
        """Return what living workers still hold."""
        return [leak for worker in self.alive() for leak in held(worker)]

    def alive(self) -> list[Worker]:
        """Return the workers that live and are warm."""
        alive = [name for name, one in self.transports.items() if not one.dead]
        return [worker for name in alive if hasattr(worker := self.workers[name], "core")]

    async def quiet(self, within_s: float = 30.0) -> None:
        """Wait until no living worker holds anything."""
        await until(lambda: not self.leaks(), within_s)


@dataclass
class Cluster:
    """The client over all workers, and who starts them."""

    fleet: Fleet
    hands: Hands

    def place(self, role: Role, prompt: list[int], tenant: str = "a") -> str:
        """Return who serves a prompt now."""
        return self.fleet.crew.find(role, tenant, prompt).name

    def serving(self) -> list[str]:
        """Return who is a member now."""
        now = self.fleet.crew._placement.now
        members = self.fleet.crew.members
        return sorted(n for n in now.prefill | now.decode if members[n].state != "lost")

    def serves(self, name: str) -> bool:
        """Tell whether a worker is a member that lives."""
        return name in self.serving()


@asynccontextmanager
async def cluster_of(
    model: Path,
    *,
    link: LinkOptions = QUICK,
    others: dict[str, EngineOptions] | None = None,
    key: bytes = KEY,
    crew: dict[str, Any] | None = None,
    guard: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Cluster]:
    """Yield two prefill and two decode workers, or as many as `crew` says, for two tenants.

    `guard`: options of workers that are guarded.
    """
    options = {"shield": "off", "guard_led": bool(guard), **(guard or {}), **options}
    engine = engine_options(model, **options)
    hands = Hands(engine, link, others or {})
    led = msgspec.structs.replace(QUICK_CREW, **(crew or {}))
    fleet = await Fleet.start(hands, led, key, engine.share, engine)
    try:
        await fleet.set_tenants({"a": 0.5, "b": 0.5})
        yield Cluster(fleet, hands)
    finally:
        await fleet.close()
