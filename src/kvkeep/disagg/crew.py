"""Who works in a cluster: workers start, join at epochs' ends, are drained, die and come back."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from kvkeep.disagg.members import CrewOptions, Launch, Member, check_alike
from kvkeep.disagg.options import Role
from kvkeep.disagg.router import Configuration, Placement
from kvkeep.engine.api import EngineStats, ModelInfo, TenantTerms
from kvkeep.errors import ConfigError, EngineError, EngineStopped, KvkeepError

ROLES: Final[tuple[Role, ...]] = ("prefill", "decode")
MOST_AGAIN_S: Final = 30.0
"""The longest time between two attempts to start a worker."""

Settled = tuple[dict[str, float], dict[str, TenantTerms] | None]

log = logging.getLogger(__name__)


class _DiedAnyway(ConfigError):
    """A worker that was to be ended has died, and is being started again."""


class Crew:
    """A cluster's workers; `started` and used inside one event loop."""

    def __init__(self, launch: Launch, key: bytes, options: CrewOptions) -> None:
        """`key` is what prompts are placed by: 32 random bytes."""
        self.options = options
        self.members: dict[str, Member] = {}
        self.settled: Settled | None = None
        """Tenants' shares and terms, for workers that come later."""
        self._launch = launch
        self._placement = Placement(key, Configuration(0, frozenset(), frozenset()))
        self._info: ModelInfo | None = None
        self._starts: dict[str, int] = defaultdict(int)
        self._ended = asyncio.Event()
        """The present epoch's end."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        """Held by what an operator has asked for: one thing at a time."""
        """Of the members on purpose, one change at a time."""
        self.closed = False
        """Nobody comes back any more."""

    @property
    def info(self) -> ModelInfo:
        """Return what all workers serve."""
        if self._info is None:
            raise EngineStopped("the cluster was not started")
        return self._info

    @property
    def epoch(self) -> int:
        """Return the number of the present configuration."""
        return self._placement.now.epoch

    async def start(self) -> None:
        """Start all workers; raises what the first one failed with, and none is left then."""
        counts: dict[Role, int] = {"prefill": self.options.prefill, "decode": self.options.decode}
        names = [(_name(role, i), role) for role, count in counts.items() for i in range(count)]
        try:
            async with asyncio.TaskGroup() as group:
                for name, role in names:
                    group.create_task(self._bring(name, role))
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None
        self.end_epoch()
        self._start(self._tend())
        self._start(self._listen())

    def find(self, role: Role, tenant: str, prompt_ids: Sequence[int]) -> Member:
        """Return the worker of a role for a prompt; raises `EngineStopped` where none lives."""
        self._check_open()
        return self.members[self._placement.worker(role, tenant, prompt_ids)]

    def serving(self) -> list[Member]:
        """Return the workers that have not died."""
        return [member for member in self.members.values() if not member.lost]

    def lost(self, member: Member, why: object) -> None:
        """Pass a worker over from now on, end what waits for it, and start it again."""
        if member.lost or self.closed:
            return
        log.warning("worker %s is lost: %s", member.name, why)
        member.state = "lost"
        member.client.abandon(f"worker {member.name} is lost")
        self._placement.died(member.name)
        self._start(self._again(member))

    async def changed(self) -> None:
        """Wait for the present epoch's end."""
        await self._ended.wait()

    def end_epoch(self) -> None:
        """Begin the next epoch, with whom has joined and without whom has left."""
        self._placement.end_epoch()
        now = self._placement.now
        for member in self.members.values():
            if member.state == "starting" and member.name in now.of(member.role):
                member.state = "serving"
        self._ended.set()
        self._ended = asyncio.Event()

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until the cluster ends."""
        self._start(work)

    # On purpose

    async def restart(self, name: str) -> None:
        """Drain a worker, end it and start it again; raises `ConfigError` for none of the name."""
        async with self._changing:
            await self._restart(name)

    async def restart_all(self) -> None:
        """Restart the workers one after the other; one that has died is being started anyway."""
        async with self._changing:
            for name in sorted(self.members):
                with suppress(_DiedAnyway):
                    await self._restart(name)

    async def scale(self, role: Role, count: int, *, now: int | None = None) -> None:
        """Have so many workers of a role: the last ones are drained, or new ones are started.

        `now`: how many there are to the caller's knowledge; where others have come or gone
        meanwhile nothing is done.
        """
        if count < (role == "decode"):
            raise ConfigError(f"{role}: {count} workers are too few")
        async with self._changing:
            have = sorted(m.name for m in self.members.values() if m.role == role)
            if now is not None and len(have) != now:
                return
            want = [_name(role, i) for i in range(count)]
            for name in want:
                if name not in have:
                    await self._bring(name, role)
            for name in have:
                if name not in want:
                    async with self._drained(name):
                        del self.members[name]
            await self._settled()

    async def close(self) -> None:
        """End all workers."""
        self.closed = True
        self._ended.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*[member.client.close() for member in self.members.values()])

    # Inside

    async def _restart(self, name: str) -> None:
        async with self._drained(name) as member:
            pass
        try:
            await self._bring(name, member.role)
        except KvkeepError:
            self._start(self._again(member))
            raise
        await self._settled()

    @asynccontextmanager
    async def _drained(self, name: str) -> AsyncIterator[Member]:
        """End a worker once it has left and its requests are over, or their time is."""
        member = self.members.get(name)
        if member is None:
            raise ConfigError(f"worker: there is none called {name!r} that lives")
        if member.lost:
            raise _DiedAnyway(f"worker: {name} has died; it is being started again")
        member.state = "draining"
        self._placement.leave(member.role, name)
        await self.changed()
        try:
            async with asyncio.timeout(self.options.drain_s):
                await member.idle.wait()
        except TimeoutError:
            log.warning("worker %s still has %d requests", name, member.streams)
        if member.lost:
            raise _DiedAnyway(f"worker: {name} died meanwhile; it is being started again")
        member.state = "lost"
        await member.client.close()
        yield member

    async def _settled(self) -> None:
        """Wait until those that were to join have joined."""
        if self._placement.changes:
            await self.changed()

    async def _bring(self, name: str, role: Role) -> None:
        """Start a worker that joins at the epoch's end; raises what it failed with."""
        self._check_open()
        client = self._launch(name, role)
        try:
            info = await client.info()
            if self._info is None:
                self._info = info
            check_alike(self._info, info, name, role)
            settled: Settled | None = None
            while settled is not self.settled:
                settled = self.settled
                if settled is not None:
                    await client.set_tenants(*settled)
            self._check_open()
        except BaseException:
            await _to_the_end(client.close())
            raise
        self._starts[name] += 1
        self.members[name] = Member(name, role, client, info, self._starts[name])
        self._placement.join(role, name)

    async def _again(self, member: Member) -> None:
        """Start a lost worker again, as often as it takes."""
        await member.client.close()
        for turn in itertools.count():
            try:
                await self._bring(member.name, member.role)
            except KvkeepError as error:
                log.warning("worker %s can't be started: %s", member.name, error)
            else:
                return
            await asyncio.sleep(min(MOST_AGAIN_S, self.options.again_s * 2**turn))

    async def _tend(self) -> None:
        """End epochs for ever, where members change."""
        while True:
            await asyncio.sleep(self.options.epoch_s)
            if self._placement.changes:
                self.end_epoch()

    async def _listen(self) -> None:
        """Ask the workers for ever how they are."""
        while True:
            await asyncio.gather(*[self.ask(member) for member in self.serving()])
            await asyncio.sleep(self.options.beat_s)

    async def ask(self, member: Member) -> EngineStats | None:
        """Return what a worker says of itself; one that does not answer is lost."""
        try:
            async with asyncio.timeout(self.options.silence_s):
                member.stats = await member.client.stats()
        except (EngineError, TimeoutError) as error:
            if member.state != "draining":
                self.lost(member, str(error) or "it does not answer")
        return member.stats

    def _check_open(self) -> None:
        if self.closed:
            raise EngineStopped("the cluster was stopped")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for something, also where whoever waits is cancelled meanwhile, which is told then."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        with suppress(KvkeepError):
            await task
        raise asyncio.CancelledError
    await task


def _name(role: Role, number: int) -> str:
    return f"{role}-{number}"
