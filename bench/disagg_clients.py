"""Clients of a cluster in which everything fails, and what became of each of them.

Half of the clients leave in the middle, some have little time. Whoever stays must be told what one
engine tells, or why not, before the time is over. A client whose router is gone asks the next one.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Literal, NamedTuple, Protocol

from kvkeep.engine.api import EngineClient, FinishReason, GenerateRequest, SamplingParams
from kvkeep.errors import EngineError
from tests.disagg.faulty import Fault, FaultyLink

TENANTS: Final = ("a", "b")
LENGTHS: Final = (20, 600)
ANSWERS: Final = (4, 40)
SETTLE_S: Final = 60.0
"""What the cluster gets to let go of everything at the end."""
LOOK_S: Final = 0.5
FAULTS: Final[tuple[Fault, ...]] = ("stall", "drop", "corrupt", "corrupt", "none")
BROKEN_BYTES: Final = 60_000
"""A link fails within so many bytes."""

End = Literal["answered", "left", "deadline", "error", "hung"]
Event = Literal["kill", "freeze", "restart", "break", "version", "seal"]
Tokens = Mapping[int, list[int]]
"""By sequence."""


class Target(Protocol):
    """A cluster that can be hurt."""

    links: Sequence[FaultyLink]

    async def client(self) -> EngineClient:
        """Return who answers now; waits while nobody does."""

    async def kill(self, draw: random.Random, *, freeze: bool = False) -> None:
        """Kill a worker; or have it do nothing more, and say nothing of that."""

    async def restart(self) -> None:
        """Kill the router and start another one."""

    async def disguise(self, draw: random.Random, what: Literal["version", "seal"]) -> None:
        """Kill a worker and have another come in its place that must not join."""

    async def held(self) -> Mapping[str, int]:
        """Return the pages that something holds on each worker that lives."""


class Question(NamedTuple):
    """What is asked, and more than once."""

    tenant: str
    prompt: tuple[int, ...]
    params: SamplingParams

    def request(self, name: str, deadline_s: float | None) -> GenerateRequest:
        """Return it as a request."""
        return GenerateRequest(
            id=name,
            tenant=self.tenant,
            scope=f"scope-{self.tenant}",
            prompt_ids=self.prompt,
            params=self.params,
            deadline_s=deadline_s,
        )


class Asked(NamedTuple):
    """One request of one client."""

    number: int
    question: int
    deadline_s: float
    leaves_after: int | None
    """Chunks; None: it stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many requests there are, and how often what fails."""

    requests: int
    clients: int = 6
    questions: int = 60
    kills: int = 10
    freezes: int = 3
    restarts: int = 2
    breaks: int = 40
    disguises: tuple[Literal["version", "seal"], ...] = ("version", "seal")
    deadline_s: float = 60.0
    hurried: float = 0.06
    """Part of the requests whose time is a second at most."""
    grace_s: float = 5.0
    """A client that has heard nothing so long after its deadline hangs."""


@dataclass(slots=True)
class Told:
    """What all clients were told."""

    ends: Counter[End] = field(default_factory=Counter)
    wrong: int = 0
    """Requests of which a token is not the one engine's, or is missing."""
    late_s: float = 0.0
    """By how much the latest answer or error missed its deadline."""
    leaked: Mapping[str, int] = field(default_factory=dict)
    events: Counter[Event] = field(default_factory=Counter)


def questions(number: int, seed: int, vocabulary: int = 200) -> list[Question]:
    """Return questions of all tenants: greedy and drawn ones, of one answer and of two."""
    draw = random.Random(seed)
    found = []
    for at in range(number):
        params = SamplingParams(
            max_tokens=draw.randrange(*ANSWERS),
            temperature=float(at % 3 > 0),
            seed=draw.randrange(1 << 30),
            n=2 if at % 10 == 9 else 1,
            ignore_eos=True,
        )
        prompt = tuple(draw.randrange(1, vocabulary) for _ in range(draw.randrange(*LENGTHS)))
        found.append(Question(TENANTS[at % len(TENANTS)], prompt, params))
    return found


async def right_answers(engine: EngineClient, asked: Sequence[Question]) -> list[Tokens]:
    """Return what an engine that nothing happens to answers, one question after the other."""
    found: list[Tokens] = []
    for number, question in enumerate(asked):
        told: dict[int, list[int]] = defaultdict(list)
        async for chunk in engine.submit(question.request(f"right-{number}", None)):
            told[chunk.index] += chunk.token_ids
        found.append(told)
    return found


def requests(plan: Plan, draw: random.Random) -> Iterator[Asked]:
    """Yield what is asked; every second client leaves."""
    for number in range(plan.requests):
        hurried = draw.random() < plan.hurried
        yield Asked(
            number,
            draw.randrange(plan.questions),
            draw.uniform(0.05, 1.0) if hurried else plan.deadline_s,
            draw.randrange(8) if number % 2 else None,
        )


def events(plan: Plan, draw: random.Random) -> deque[tuple[int, Event]]:
    """Return after how many requests what happens, in order."""
    kinds: list[Event] = ["kill"] * plan.kills
    kinds += ["freeze"] * plan.freezes
    kinds += ["restart"] * plan.restarts
    kinds += ["break"] * plan.breaks
    kinds += plan.disguises
    last = max(1, plan.requests * 9 // 10)
    return deque(sorted((draw.randrange(last), kind) for kind in kinds))


class Storm:
    """One fault run."""

    def __init__(
        self, target: Target, plan: Plan, asked: Sequence[Question], right: Sequence[Tokens]
    ) -> None:
        self.told = Told()
        self._target = target
        self._plan = plan
        self._asked = asked
        self._right = right
        self._ended = 0
        self._one = asyncio.Event()
        """One more has ended."""
        self._starting = asyncio.Lock()
        """Of what waits for processes to start; one at a time, beside everything else."""

    async def run(self, seed: int) -> Told:
        """Let all clients ask while everything fails, then wait until nothing is held."""
        draw = random.Random(seed)
        waiting = requests(self._plan, draw)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hurt(events(self._plan, draw), draw, group))
            for _ in range(self._plan.clients):
                group.create_task(self._client(waiting))
        for link in self._target.links:
            link.fail("none", 0)
        self.told.leaked = await self._quiet()
        return self.told

    async def _client(self, waiting: Iterator[Asked]) -> None:
        for one in waiting:
            await self._ask(one)
            self._ended += 1
            self._one.set()

    async def _hurt(
        self, due: deque[tuple[int, Event]], draw: random.Random, group: asyncio.TaskGroup
    ) -> None:
        """Have happen what is due; workers that must not join are told so while all goes on."""
        while due:
            while self._ended < due[0][0]:
                self._one.clear()
                await self._one.wait()
            what = due.popleft()[1]
            self.told.events[what] += 1
            match what:
                case "kill" | "freeze":
                    await self._target.kill(draw, freeze=what == "freeze")
                case "restart":
                    async with self._starting:
                        await self._target.restart()
                case "break":
                    if self._target.links:
                        link = draw.choice(self._target.links)
                        link.fail(draw.choice(FAULTS), draw.randrange(BROKEN_BYTES))
                case _:
                    group.create_task(self._disguise(draw, what))

    async def _disguise(self, draw: random.Random, what: Literal["version", "seal"]) -> None:
        async with self._starting:
            await self._target.disguise(draw, what)

    async def _ask(self, one: Asked) -> None:
        clock = asyncio.get_running_loop().time
        end_s = clock() + one.deadline_s
        told: dict[int, list[int]] = defaultdict(list)
        try:
            async with asyncio.timeout_at(end_s + self._plan.grace_s):
                how = await self._asked_until_told(one, end_s, told)
        except TimeoutError:
            how = "hung"
        self.told.ends[how] += 1
        self.told.wrong += is_wrong(told, self._right[one.question], whole=how == "answered")
        if how != "left":
            self.told.late_s = max(self.told.late_s, clock() - end_s)

    async def _asked_until_told(self, one: Asked, end_s: float, told: dict[int, list[int]]) -> End:
        """Ask each router that there is until one says something."""
        clock = asyncio.get_running_loop().time
        question = self._asked[one.question]
        for attempt in count():
            try:
                async with asyncio.timeout_at(end_s):
                    client = await self._target.client()
            except TimeoutError:
                return "error"  # nobody listens: its connection is refused
            told.clear()
            left_s = max(0.0, end_s - clock())
            try:
                return await _read(
                    client, question.request(f"{one.number}.{attempt}", left_s), one, told
                )
            except EngineError:
                if await self._still(client):
                    return "error"
        raise AssertionError

    async def _still(self, client: EngineClient) -> bool:
        """Tell whether a router that said no is there yet: one that was killed says nothing."""
        try:
            async with asyncio.timeout(LOOK_S):
                return await self._target.client() is client
        except TimeoutError:
            return False

    async def _quiet(self) -> Mapping[str, int]:
        """Return what is held once nothing is, or the time for it is over."""
        end_s = asyncio.get_running_loop().time() + SETTLE_S
        while True:
            held = {name: pages for name, pages in (await self._target.held()).items() if pages}
            if not held or asyncio.get_running_loop().time() > end_s:
                return held
            await asyncio.sleep(LOOK_S)


async def _read(
    client: EngineClient, request: GenerateRequest, one: Asked, told: dict[int, list[int]]
) -> End:
    """Read one answer, up to where its client leaves."""
    stream = client.submit(request)
    left = request.params.n
    chunks = 0
    try:
        while left and chunks != one.leaves_after:
            chunk = await anext(stream)
            chunks += 1
            told[chunk.index] += chunk.token_ids
            if chunk.finish is FinishReason.DEADLINE:
                return "deadline"
            if chunk.error is not None:
                return "error"
            left -= chunk.finish is not None
    finally:
        await stream.aclose()
    return "left" if left else "answered"


def is_wrong(told: Tokens, right: Tokens, *, whole: bool) -> bool:
    """Tell whether what was told is not a beginning of what is right, or not all of it."""
    begun = all(tokens == right[index][: len(tokens)] for index, tokens in told.items())
    return not begun or (whole and dict(told) != dict(right))
