"""The last level below memory: a disk's segments, or frames in a service."""

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
    """In place of a disk."""


class Lowest(NamedTuple):
    """A level, the part of it that pages may fill, and what makes the place of its frames."""

    level: Level | None = None
    usable: float = 1.0
    make: Callable[[Moving], Frames] | None = None


def lowest_of(sizes: TierSizes, files: Files | None, remote: Frames | None) -> Lowest:
    """Return the level of a directory, or of a service."""
    if files is not None:
        make = partial(Segments, files, sizes.disk_bytes)
        return Lowest(Level("disk", sizes.disk_bytes), 1 - SPARE, make)
    if remote is not None:
        return Lowest(Level("remote", sizes.remote_bytes), 1.0, partial(_as_it_is, remote))
    return Lowest()


def _as_it_is(remote: Frames, _: Moving) -> Frames:
    """Return a place in which nothing is moved."""
    return remote
