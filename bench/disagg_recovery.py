"""How long requests take longer after a worker was killed, when nothing else fails."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, NamedTuple, Protocol

import numpy as np

from bench.disagg_clients import Question
from kvkeep.engine.api import EngineClient
from kvkeep.errors import EngineError

WINDOW: Final = 8
"""Answers whose median is looked at."""
SLOWER: Final = 1.5
"""A window is slow whose median is above so many times that of all answers before the kill."""
CLIENTS: Final = 3


class Answer(NamedTuple):
    """When one was asked for and was there."""

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
        """Wait until all serve that were killed."""


class Watch(NamedTuple):
    """How long requests are watched before and after a kill."""

    before_s: float
    after_s: float
    """At most, where what was killed may be back sooner."""
    ends_early: bool = False
    """Once all serve again, and for `before_s` have."""


def recovered_s(answers: Sequence[Answer], killed_s: float) -> float:
    """Return how long after a kill the last slow window ended; 0 where none was slow."""
    ordered = sorted(answers, key=lambda answer: answer.ended_s)
    usual_s = float(np.median([one.jct_s for one in ordered if one.ended_s <= killed_s]))
    after = [one for one in ordered if one.ended_s > killed_s]
    last_s = killed_s
    for at in range(len(after) - WINDOW + 1):
        window = after[at : at + WINDOW]
        if np.median([one.jct_s for one in window]) > SLOWER * usual_s:
            last_s = window[-1].ended_s
    return last_s - killed_s


async def recoveries(
    target: Target, asked: Sequence[Question], kills: int, watch: Watch, draw: random.Random
) -> list[float]:
    """Kill so many workers, one after another, beside clients that go on asking.

    Raises `EngineError` where one of them is let down.
    """
    clock = asyncio.get_running_loop().time
    single = [one for one in asked if one.params.n == 1]
    numbers = count()
    found: list[float] = []
    for turn in range(kills + 1):
        answers: list[Answer] = []
        killed_s = clock() + watch.before_s
        until = _Until(killed_s + watch.after_s * bool(turn))
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(_steady(target, single, until, numbers, answers))
            if turn:  # the first one warms up
                await asyncio.sleep(watch.before_s)
                await target.kill(draw)
                if watch.ends_early:
                    await target.whole()
                    until.time_s = min(until.time_s, clock() + watch.before_s)
        if turn:
            found.append(recovered_s(answers, killed_s))
    return found


@dataclass(slots=True)
class _Until:
    """When clients stop asking."""

    time_s: float


async def _steady(
    target: Target,
    asked: Sequence[Question],
    until: _Until,
    numbers: count[int],
    answers: list[Answer],
) -> None:
    """Ask one question after the other."""
    clock = asyncio.get_running_loop().time
    while clock() < until.time_s:
        number = next(numbers)
        begun_s = clock()
        client = await target.client()
        async for chunk in client.submit(
            asked[number % len(asked)].request(f"steady-{number}", None)
        ):
            if chunk.error is not None:
                raise EngineError(chunk.error)
        answers.append(Answer(begun_s, clock()))
