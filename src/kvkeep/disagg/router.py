"""Which workers serve a prompt: rendezvous hashing of (tenant, first page) over an epoch's members.

The choice reads the tenant, its prompt's first page and the epoch's configuration, and nothing
else: no load, no cache, no other tenant. So nobody's traffic moves another's hits, unless an
operator has the members follow the load (`disagg/scaling.py`). Those that join or leave count from
the next epoch on; one that has died is passed over at once, and only the prompts that were placed
on it move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from kvkeep.disagg.options import Role
from kvkeep.errors import ConfigError, EngineStopped
from kvkeep.types import PAGE_TOKENS

KEY_BYTES: Final = 32
_SCORE_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Configuration:
    """The members of one epoch, the same for all who route by it."""

    epoch: int
    prefill: frozenset[str]
    decode: frozenset[str]

    def of(self, role: Role) -> frozenset[str]:
        """Return the workers of a role."""
        return self.prefill if role == "prefill" else self.decode


def subject(tenant: str, prompt_ids: Sequence[int]) -> bytes:
    """Return what a prompt is placed by: its tenant and its first page."""
    owner = tenant.encode()
    page = b"".join(token.to_bytes(4, "little") for token in prompt_ids[:PAGE_TOKENS])
    return len(owner).to_bytes(4, "little") + owner + page


def ranking(key: bytes, workers: Iterable[str], role: Role, placed: bytes) -> list[str]:
    """Return the workers in the order in which they are asked.

    `key` is the cluster's secret: without it nobody can choose prompts that meet on one worker.
    """

    def score(worker: str) -> bytes:
        digest = hashlib.blake2b(key=key, digest_size=_SCORE_BYTES, person=role.encode())
        name = worker.encode()
        digest.update(len(name).to_bytes(4, "little") + name + placed)
        return digest.digest()

    return sorted(set(workers), key=lambda worker: (score(worker), worker), reverse=True)


@dataclass(slots=True)
class Placement:
    """The epoch's configuration, who is to join or leave at its end, and who has died."""

    key: bytes
    """32 bytes, the same for all routers of a cluster."""
    now: Configuration
    _next: Configuration = field(init=False)
    _dead: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ConfigError(f"key: {len(self.key)} bytes; {KEY_BYTES} random ones are needed")
        self._next = self.now

    def worker(self, role: Role, tenant: str, prompt_ids: Sequence[int]) -> str:
        """Return the worker of a role for a prompt; raises `EngineStopped` where none lives."""
        placed = subject(tenant, prompt_ids)
        ranked = ranking(self.key, self.now.of(role), role, placed)
        alive = (worker for worker in ranked if worker not in self._dead)
        found = next(alive, None)
        if found is None:
            raise EngineStopped(f"no {role} worker is left; start one, or wait for it to come back")
        return found

    def join(self, role: Role, worker: str) -> None:
        """Have a worker be a member from the next epoch on; one that had died is back by then."""
        self._change(role, self._next.of(role) | {worker})

    def leave(self, role: Role, worker: str) -> None:
        """Have a worker be no member from the next epoch on."""
        self._change(role, self._next.of(role) - {worker})

    def died(self, worker: str) -> None:
        """Pass a worker over from now on; it has to join again."""
        self._dead.add(worker)
        for role in ("prefill", "decode"):
            self.leave(role, worker)

    @property
    def changes(self) -> bool:
        """Tell whether the next epoch's members are others."""
        return self._next != self.now

    def end_epoch(self) -> Configuration:
        """Begin the next epoch; return its configuration."""
        self.now = self._next = replace(self._next, epoch=self.now.epoch + 1)
        self._dead -= self._members()
        return self.now

    def _members(self) -> frozenset[str]:
        return self.now.prefill | self.now.decode

    def _change(self, role: Role, members: frozenset[str]) -> None:
        if role == "prefill":
            self._next = replace(self._next, prefill=members)
        else:
            self._next = replace(self._next, decode=members)
