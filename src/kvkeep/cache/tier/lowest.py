"""The levels below memory: a disk's segments, and frames in a service."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from kvkeep.cache.tier.backroom import Moving
from kvkeep.cache.tier.files import Files
from kvkeep.cache.tier.frames import Frames
from kvkeep.cache.tier.levels import Level
from kvkeep.cache.tier.segments import SPARE, Segments


class TierSizes(NamedTuple):
    """What a tier may take; 0: there is none."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    remote_bytes: int = 0


class Lower(NamedTuple):
    """A level, and what makes the place of its frames."""

    level: Level
    make: Callable[[Moving], Frames]


def lower_of(sizes: TierSizes, files: Files | None, remote: Frames | None) -> list[Lower]:
    """Return the levels of a directory and of a service, the nearer one first."""
    found: list[Lower] = []
    if files is not None:
        level = Level("disk", sizes.disk_bytes, usable=1 - SPARE)
        found.append(Lower(level, partial(Segments, files, sizes.disk_bytes)))
    if remote is not None:
        found.append(Lower(Level("remote", sizes.remote_bytes), partial(_as_it_is, remote)))
    return found


def _as_it_is(remote: Frames, _: Moving) -> Frames:
    """Return a place in which nothing is moved."""
    return remote
