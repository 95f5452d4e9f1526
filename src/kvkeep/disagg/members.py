"""A cluster's workers, as the one who leads them sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from kvkeep.disagg.handover import LEAST_TOKENS, PAIRED, PATIENCE_S
from kvkeep.disagg.options import Role
from kvkeep.engine.api import EngineStats, ModelInfo, WorkerUse
from kvkeep.engine.client import MessageClient
from kvkeep.errors import ConfigError

Launch = Callable[[str, Role], MessageClient]
"""Starts a worker of this name and role; called inside a running event loop."""

State = Literal["starting", "serving", "draining", "lost"]

ALIKE: Final = ("version", *PAIRED)
"""What all workers of a cluster have in common."""


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers of a role there are by what all of them have under way."""

    most: int
    """Of these; there are never fewer than at the start."""
    load: float
    """Requests under way on a worker, at the mean, that are enough."""


class CrewOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers there are, and how they are led."""

    prefill: int = 1
    decode: int = 1
    least_tokens: int = LEAST_TOKENS
    """Shorter prompts are computed where they are answered."""
    patience_s: float = PATIENCE_S
    """A prompt that takes longer elsewhere is computed where it is answered."""
    epoch_s: float = 5.0
    """Workers join and leave at the ends of configuration epochs of this length."""
    beat_s: float = 1.0
    silence_s: float = 60.0
    """A worker that says nothing for so long is given up."""
    return_s: float = 60.0
    """A request waits so long for a worker to come back where none of a role is left."""
    drain_s: float = 30.0
    """What a draining worker's requests get to end."""
    again_s: float = 1.0
    """A worker that could not be started is tried again after so long, then twice as long."""
    scaling: dict[Role, Scaling] = {}
    """Roles left out have a fixed number of workers."""
    scale_s: float = 300.0
    """Load is looked at for so long; then one worker of a role starts or leaves at most."""

    def __post_init__(self) -> None:
        if self.decode < 1:
            raise ConfigError("cluster_decode: a cluster needs one decode worker or more")
        if self.prefill < 0:
            raise ConfigError("cluster_prefill: must not be negative")


@dataclass(eq=False, slots=True)
class Member:
    """One worker that was started; one that is started again is another member of this name."""

    name: str
    role: Role
    client: MessageClient
    info: ModelInfo
    starts: int
    state: State = "starting"
    streams: int = 0
    computing: int = 0
    """Of them, those that wait for it alone: for a prompt where it prefills, else for an answer."""
    stats: EngineStats | None = None
    """What it said last."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def lost(self) -> bool:
        """Tell whether it has ended."""
        return self.state == "lost"

    def take(self) -> None:
        """Count a request that uses it."""
        self.streams += 1
        self.idle.clear()

    def let_go(self) -> None:
        """Count one fewer."""
        self.streams -= 1
        if not self.streams:
            self.idle.set()

    def use(self, epoch: int) -> WorkerUse:
        """Return what the operator is told of it."""
        return WorkerUse(
            name=self.name,
            role=self.role,
            state=self.state,
            epoch=epoch,
            streams=self.streams,
            starts=self.starts,
            pid=self.info.pid,
            held_pages=0 if self.stats is None else held_pages(self.stats),
        )


def held_pages(stats: EngineStats) -> int:
    """Return the pages that something holds, public ones left out."""
    unused = sum(use.unused_pages for use in stats.tenants)
    return max(0, stats.pages_used - unused - stats.sharing.public_pages)


def check_alike(ours: ModelInfo, theirs: ModelInfo, name: str, role: Role) -> None:
    """Refuse a worker that differs; raises `ConfigError` that names both values."""
    for what in ALIKE:
        here, there = getattr(ours, what), getattr(theirs, what)
        if here != there:
            raise ConfigError(
                f"{what}: worker {name} has {there!r} and this cluster {here!r}; start both alike"
            )
    if role == "prefill" and not theirs.link:
        raise ConfigError(f"link: prefill worker {name} hands no pages over; give it an address")
