"""How long requests take longer after a worker was killed, when nothing else fails.

Questions differ by an order of magnitude in what they take, and machines by a third from one minute
to the next: each answer is held against the same question's before the first of these kills, and
that ratio against those of the same spell before its kill. So slowness that stays from spell to
spell is not in the figure: `before` tells it. Spells in which nobody is killed are watched alike:
what they come to is what the machine does to the figure by itself.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, NamedTuple, Protocol

import numpy as np

from bench.disagg_clients import Question
from kvkeep.engine.api import EngineClient
from kvkeep.errors import EngineError

WINDOW_S: Final = 3.0
"""What clients do in such a time is looked at, again and again."""
STEP_S: Final = 0.25
SLOWER: Final = 1.5
"""An answer is slow that takes so many times what its question does before the kill; a window,
where clients wait for slow answers more than for others. A few that never end fill it."""
CLIENTS: Final = 3
ROUNDS: Final = 3
"""Every question is asked so often before anybody is killed."""


class Answer(NamedTuple):
    """Which question's, when it was asked for and when it was there."""

    question: int
    begun_s: float
    ended_s: float

    @property
    def jct_s(self) -> float:
        """Return what its client waited."""
        return self.ended_s - self.begun_s


class Target(Protocol):
    """A cluster of which a worker can be killed."""

    async def client(self) -> EngineClient:
        """Return who answers now; waits while nobody does."""

    async def kill(self, draw: random.Random) -> None:
        """Kill a worker."""

    async def whole(self) -> None:
        """Wait until all serve, and none of them is one that was killed."""


class Spells(NamedTuple):
    """How many there are, and how long requests are watched before and after a kill."""

    kills: int
    unhurt: int
    before_s: float
    after_s: float
    """At most, where what was killed may be back sooner."""
    ends_early: bool = False
    """Once all serve again, and for `before_s` have."""


class Recoveries(NamedTuple):
    """Of each spell, when no window was slow any more, in seconds from its middle on."""

    killed_s: tuple[float, ...]
    """Of spells with a kill."""
    unhurt_s: tuple[float, ...]
    """Of spells without."""
    before: tuple[float, ...]
    """What answers took in the first half of each spell, in order, over what they usually do."""


def usual_s(answers: Sequence[Answer]) -> dict[int, float]:
    """Return by question what its answers take at the median."""
    found: dict[int, list[float]] = defaultdict(list)
    for one in answers:
        found[one.question].append(one.jct_s)
    return {question: float(np.median(took)) for question, took in found.items()}


def slower(answers: Sequence[Answer], usual: Mapping[int, float]) -> list[float]:
    """Return what each answer took over what its question usually does."""
    return [one.jct_s / usual[one.question] for one in answers]


def recovered_s(answers: Sequence[Answer], usual: Mapping[int, float], killed_s: float) -> float:
    """Return how long after a kill the last slow window ended; 0 where none was slow."""
    before = [one for one in answers if one.ended_s <= killed_s]
    most = SLOWER * float(np.median(slower(before, usual) or 1.0))
    slow = np.array(slower(answers, usual)) > most
    begun, ended = np.array([one[1:] for one in answers]).T
    first_s, last_s = killed_s + WINDOW_S, killed_s
    for end_s in np.arange(first_s, max(first_s, ended.max()) + STEP_S, STEP_S):
        waited = np.minimum(ended, end_s) - np.maximum(begun, end_s - WINDOW_S)
        waited = np.clip(waited, 0.0, None)
        if waited[slow].sum() > waited.sum() / 2:
            last_s = float(end_s)
    return last_s - killed_s


async def recoveries(
    target: Target, asked: Sequence[Question], spells: Spells, draw: random.Random
) -> Recoveries:
    """Kill so many workers, one after another, beside clients that go on asking.

    Raises `EngineError` where one of them is let down.
    """
    single = [one for one in asked if one.params.n == 1]
    clients = _Clients(target, single)
    await clients.ask(_Until(answers=len(single)))  # fills caches
    usual = usual_s(await clients.ask(_Until(answers=ROUNDS * len(single))))
    every = [True] * spells.kills + [False] * spells.unhurt
    draw.shuffle(every)
    found: dict[bool, list[float]] = {True: [], False: []}
    before: list[float] = []
    for kills in every:
        answers, middle_s = await _spell(clients, spells, draw if kills else None)
        found[kills].append(recovered_s(answers, usual, middle_s))
        early = [one for one in answers if one.ended_s <= middle_s]
        before += [float(np.median(slower(early, usual)))] if early else []
    return Recoveries(tuple(found[True]), tuple(found[False]), tuple(before))


async def _spell(
    clients: _Clients, spells: Spells, draw: random.Random | None
) -> tuple[list[Answer], float]:
    """Return a spell's answers and its middle, where a worker is killed; None: nobody is."""
    await clients.target.whole()
    clock = asyncio.get_running_loop().time
    middle_s = clock() + spells.before_s
    until = _Until(time_s=middle_s + spells.after_s)
    answers = asyncio.ensure_future(clients.ask(until))
    try:
        await asyncio.sleep(spells.before_s)
        if draw is not None:
            await clients.target.kill(draw)
        if spells.ends_early:
            await clients.target.whole()
            until.time_s = min(until.time_s, clock() + spells.before_s)
        return await answers, middle_s
    finally:
        answers.cancel()


@dataclass(slots=True)
class _Until:
    """When clients stop asking."""

    time_s: float = math.inf
    answers: float = math.inf
    """In all."""


class _Clients:
    """Some that ask one question after the other, in turn."""

    def __init__(self, target: Target, asked: Sequence[Question]) -> None:
        self.target = target
        self._asked = asked
        self._numbers = count()

    async def ask(self, until: _Until) -> list[Answer]:
        """Return what came of it; raises `EngineError` where a client was let down."""
        answers: list[Answer] = []
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(self._steady(until, answers))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return answers

    async def _steady(self, until: _Until, answers: list[Answer]) -> None:
        clock = asyncio.get_running_loop().time
        while clock() < until.time_s and len(answers) < until.answers:
            number = next(self._numbers)
            question = number % len(self._asked)
            begun_s = clock()
            client = await self.target.client()
            request = self._asked[question].request(f"steady-{number}", None)
            async for chunk in client.submit(request):
                if chunk.error is not None:
                    raise EngineError(chunk.error)
            answers.append(Answer(question, begun_s, clock()))
