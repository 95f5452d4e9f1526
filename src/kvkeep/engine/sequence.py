"""A request while the engine works on it: its sequences, their tokens and where each stands."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Self

import msgspec
import numpy as np

from kvkeep.cache.fetch import Fetch
from kvkeep.engine.apart import Part
from kvkeep.engine.api import Chunk, GenerateRequest
from kvkeep.engine.guard import Sample
from kvkeep.engine.held import Held
from kvkeep.engine.moments import Moments
from kvkeep.engine.output import SequenceOutput
from kvkeep.engine.rows import RowsToCome
from kvkeep.engine.sampling import SequenceSampling
from kvkeep.types import Int32Array, View
from kvkeep.watch import Watch


class Status(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    WAITING_FETCH = auto()
    """Pages of its prefix are on their way from a lower tier."""
    RUNNING = auto()
    PARKED = auto()
    """Scored, while other beams of its request have yet to be; holds nothing."""
    FINISHED = auto()


class TokenBuffer:
    """Token ids that grow at the end, in memory that goes back to the system's allocator.

    So an engine that overwrites what it frees keeps no ended request's tokens; numpy keeps small
    arrays' memory at hand as it is.
    """

    __slots__ = ("_ids", "_length")

    def __init__(self, ids: Int32Array, reserve: int = 64) -> None:
        self._ids = _room(len(ids) + reserve)
        self._ids[: len(ids)] = ids
        self._length = len(ids)

    @classmethod
    def of(cls, spec: GenerateRequest) -> Self:
        """Return a request's prompt, with room for its answer."""
        return cls(ids_of(spec.prompt_ids), min(spec.params.max_tokens, 4096))

    def __len__(self) -> int:
        return self._length

    def append(self, token_id: int) -> None:
        """Add one token."""
        if self._length == len(self._ids):
            before, self._ids = self._ids, _room(2 * self._length)
            self._ids[: self._length] = before
        self._ids[self._length] = token_id
        self._length += 1

    def copy(self) -> TokenBuffer:
        """Return an independent buffer of the same tokens."""
        return TokenBuffer(self.ids(), len(self._ids) - self._length)

    def ids(self, end: int | None = None) -> Int32Array:
        """Return the first `end` tokens (default all), a view that later appends leave alone."""
        return self._ids[: self._length if end is None else end]


def ids_of(tokens: Iterable[int]) -> Int32Array:
    """Return tokens as an array in memory of the system's allocator."""
    return np.frombuffer(array("i", tokens), np.int32)


def _room(count: int) -> Int32Array:
    return np.frombuffer(bytearray(4 * count), np.int32)


@dataclass(slots=True, eq=False)
class Request:
    """A submitted request."""

    spec: GenerateRequest
    arrived_s: float
    deadline_s: float | None
    sequences: list[Sequence] = field(default_factory=list)
    cached_tokens: int | None = None
    """Prompt tokens found among its own and pinned pages when it was first admitted."""
    awaits: bool = False
    """Whether its first token is still to come from another engine."""
    part: Part | None = None
    """The first pages of its prompt, where another worker holds them."""
    rows: Mapping[str, RowsToCome] = field(default_factory=dict)
    """By form of its pages: rows behind the last whole ones that another engine computes."""
    codec: str = "float"
    """What stores its pages; fixed once, when it is first admitted."""
    settled: bool = False
    """Whether that has happened."""
    watch: Watch | None = None
    """When its rows are observed and its tokens evicted; None: nothing of it is."""
    epoch: int = 0
    """Of its tenant's guard."""
    sample: Sample | None = None
    """What its shadow says, if it was drawn to carry one."""
    planted: tuple[int, ...] = ()
    """Tokens that follow its prompt, whatever is sampled, and nobody is told of: a probe's."""
    saved_tokens: int = 0
    """Prompt tokens that were not computed then, those of the snapshot among them."""
    first_token_s: float | None = None
    held: Held | None = None
    """Where its chunks wait, if only the best sequences are told."""
    moments: Moments = field(default_factory=Moments)

    def step_begins(self, now: float) -> None:
        """Note a step that computes rows of it, where it is the first or the answer's first."""
        if self.moments.begun_s is None:
            self.moments.begun_s = now
        if self.moments.resumed_s is None and self.first_token_s is not None:
            self.moments.resumed_s = now

    def dated(self) -> Moments:
        """Return when what happened, now that it ends."""
        self.moments.arrived_s = self.arrived_s
        self.moments.first_token_s = self.first_token_s
        self.moments.ended_s = time.monotonic()
        return self.moments

    @property
    def lacks(self) -> bool:
        """Return whether its first token, or rows that it begins with, are still to come."""
        rows = self.rows.get(self.codec)
        return self.awaits or (rows is not None and rows.state == "awaited")

    @property
    def is_probe(self) -> bool:
        """Return whether a guard asks, and not its tenant: then nobody counts or hears of it."""
        return bool(self.planted)


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's `n` sequences."""

    request: Request
    index: int
    tokens: TokenBuffer
    sampling: SequenceSampling
    output: SequenceOutput
    status: Status = Status.WAITING
    view: View | None = None
    shadow: View | None = None
    """Pages in the model's dtype that are fed the same tokens."""
    fetch: Fetch | None = None
    """Pages of its prefix on their way up, while `WAITING_FETCH`."""
    asked: bool = False
    """Whether all that may come of its prompt was asked for."""
    looked: bool = False
    """Whether pages below memory were looked for before its turn."""
    generated: int = 0
    uncommitted: bool = False
    """Whether its scope finds nothing more of it until its prompt is whole."""
    opens_s: float | None = None
    """Before that, its first token is held back; None: it is not."""
    hidden_hit: bool = False
    """Whether it is further than its own and pinned pages have brought it."""

    @property
    def account(self) -> str:
        """Return the tenant whose quota and queue it uses."""
        return self.request.spec.tenant

    @property
    def planted(self) -> int | None:
        """Return the token that comes next, whatever is sampled; None: what is sampled."""
        planted = self.request.planted
        return planted[self.generated] if planted else None

    @property
    def prompt_len(self) -> int:
        """Return the number of prompt tokens."""
        return len(self.request.spec.prompt_ids)

    def next_position(self) -> int:
        """Return the first position to compute: what is not stored, or the last token if all is."""
        assert self.view is not None
        return min(self.view.length, len(self.tokens) - 1)

    def to_edge(self, begin: int) -> int:
        """Return how many rows from `begin` on may be computed in the step under way.

        At an edge tokens may be evicted, and later rows see what is left.
        """
        watch = self.request.watch
        return len(self.tokens) if watch is None else watch.edge(self.next_position()) - begin

    def remaining(self) -> int:
        """Return how many rows are left until the next token can be sampled (at least 1)."""
        return len(self.tokens) - self.next_position()

    def shadow_position(self) -> int:
        """Return the first position its shadow has to compute, or the last token's."""
        last = len(self.tokens) - 1
        return last if self.shadow is None else min(self.shadow.length, last)

    def prefills(self) -> bool:
        """Tell whether it waits its turn for the prefill, its own or its shadow's.

        One that the snapshot has brought to its last row does too, and one whose last row is held
        back: what others sent changes when a tenant's requests are answered, but not in which
        order.
        """
        waits = self.hidden_hit or self.opens_s is not None
        behind = self.shadow_position() < len(self.tokens) - 1
        return behind or self.remaining() > 1 or (waits and not self.generated)


def stored_as(chunk: Chunk, request: Request) -> Chunk:
    """Return a sequence's last chunk with the form of its request's pages, others as they are.

    It says when what happened, too, where that was asked.
    """
    if chunk.finish is None:
        return chunk
    moments = (request.dated(),) if request.spec.timed else ()
    kv = request.codec if request.settled else None
    return msgspec.structs.replace(chunk, kv=kv, moments=moments)
