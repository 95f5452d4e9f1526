"""More workers where many requests are under way, fewer where few are: off unless asked for.

Who serves a prompt depends on who the workers are, so a number that follows the load of all tells
each tenant something of the others: whoever sees its prompts move knows that a bound was crossed.
It is one of three outcomes for each role and `scale_s`, at most log2(3) bits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final, Protocol

from kvkeep.disagg.members import CrewOptions, Member, Scaling
from kvkeep.disagg.options import Role
from kvkeep.errors import KvkeepError

FEWER: Final = 0.8
"""A worker leaves where the others would have less than so much of what is enough."""

log = logging.getLogger(__name__)


class Scaled(Protocol):
    """Whoever leads the workers, seen from here."""

    @property
    def options(self) -> CrewOptions:
        """Return how they are led."""

    @property
    def members(self) -> dict[str, Member]:
        """Return them by name."""

    async def scale(self, role: Role, count: int) -> None:
        """Have so many workers of a role."""


def wanted(now: int, least: int, under_way: float, scaling: Scaling) -> int:
    """Return how many workers a role should have: `now`, one more or one fewer.

    `under_way`: requests of all of them, at the mean of the time looked at.
    """
    if now > scaling.most or now < least:
        return now + (1 if now < least else -1)
    more = under_way > scaling.load * now and now < scaling.most
    fewer = under_way < FEWER * scaling.load * (now - 1)
    return now + (1 if more else -1 if fewer and now > least else 0)


async def scale_by_load(crew: Scaled) -> None:
    """Do so for ever; what can't be started is tried again after as long."""
    options = crew.options
    least: dict[Role, int] = {"prefill": options.prefill, "decode": options.decode}
    while True:
        seen = await _look(crew)
        for role, scaling in options.scaling.items():
            now = sum(member.role == role for member in crew.members.values())
            count = wanted(now, least[role], seen[role], scaling)
            if count == now:
                continue
            log.info("%s workers: %d -> %d, %.1f requests at a time", role, now, count, seen[role])
            try:
                await crew.scale(role, count)
            except KvkeepError as error:
                log.warning("%s workers: %d stay for now: %s", role, now, error)


async def _look(crew: Scaled) -> dict[Role, float]:
    """Return the requests under way on each role's workers, at the mean of `scale_s`."""
    options = crew.options
    turns = max(1, math.ceil(options.scale_s / options.beat_s))
    found: dict[Role, float] = {"prefill": 0.0, "decode": 0.0}
    for _ in range(turns):
        await asyncio.sleep(options.scale_s / turns)
        for member in crew.members.values():
            found[member.role] += member.computing / turns
    return found
