"""More workers where many requests are under way, fewer where few are: off unless asked for.

Who serves a prompt depends on who the workers are, so a number that follows the load of all tells
each tenant something of the others: whoever sees its prompts move knows that a bound was crossed.
Each role has one of three outcomes in each interval: log2(3) bits, and what the time that a start
or a drain takes tells besides.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final, Protocol

from kvkeep.disagg.members import CrewOptions, Member, Scaling
from kvkeep.disagg.options import Role
from kvkeep.errors import KvkeepError, unexpected

FEWER: Final = 0.8
"""A worker leaves where the others would have less than so much of what is enough."""
START_S: Final = 600.0
"""A worker that has not joined by then is given up: there is no room for it."""

log = logging.getLogger(__name__)


class Scaled(Protocol):
    """Whoever leads the workers, seen from here."""

    @property
    def options(self) -> CrewOptions:
        """Return how they are led."""

    @property
    def members(self) -> dict[str, Member]:
        """Return them by name."""

    async def scale(self, role: Role, count: int, *, now: int | None = None) -> None:
        """Have so many workers of a role, where there are `now`."""


def wanted(now: int, least: int, under_way: float, scaling: Scaling) -> int:
    """Return how many workers a role should have: `now`, one more or one fewer.

    `under_way`: requests of all of them, at the mean of the time looked at.
    """
    if now > scaling.most or now < least:
        return now + (1 if now < least else -1)
    more = under_way > scaling.load * now and now < scaling.most
    fewer = under_way < FEWER * scaling.load * (now - 1)
    return now + (1 if more else -1 if fewer and now > least else 0)


def look_until(passed_s: float, every_s: float) -> float:
    """Return the end of the next interval of which half or more is left.

    Intervals are fixed from the start: how long a change took moves no later one.
    """
    return every_s * math.ceil(passed_s / every_s + 0.5)


async def scale_by_load(crew: Scaled) -> None:
    """Do so for ever; what can't be started is tried again an interval later."""
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    while True:
        seen = await _look(crew, begun_s + look_until(clock() - begun_s, crew.options.scale_s))
        for role in crew.options.scaling:
            try:
                await _follow(crew, role, seen[role])
            except TimeoutError:
                log.warning("%s workers: no other came within %d s", role, START_S)
            except KvkeepError as error:
                log.warning("%s workers: there are as many as before: %s", role, error)
            except Exception as error:  # noqa: BLE001 - Ray's own; the next interval must come
                log.warning("%s workers: %s", role, unexpected(error))


async def _follow(crew: Scaled, role: Role, under_way: float) -> None:
    """Start a worker or drain one, where so many requests ask for it.

    None is drained while one that has died may not come back: those left may be all there are.
    """
    options = crew.options
    least = options.prefill if role == "prefill" else options.decode
    members = [member for member in crew.members.values() if member.role == role]
    now = len(members)
    count = wanted(now, least, under_way, options.scaling[role])
    whole = all(member.state == "serving" for member in members)
    if count == now or (count < now and not whole):
        return
    log.info("%s workers: %d -> %d, %.1f requests at a time", role, now, count, under_way)
    async with asyncio.timeout(START_S if count > now else None):
        await crew.scale(role, count, now=now)


async def _look(crew: Scaled, end_s: float) -> dict[Role, float]:
    """Return the requests under way on each role's workers, at the mean until then."""
    clock = asyncio.get_running_loop().time
    found: dict[Role, float] = {"prefill": 0.0, "decode": 0.0}
    turns = max(1, math.ceil((end_s - clock()) / crew.options.beat_s))
    for left in range(turns, 0, -1):
        await asyncio.sleep((end_s - clock()) / left)
        for member in crew.members.values():
            found[member.role] += member.computing / turns
    return found
