"""What crosses between a client and an engine loop: tagged records, no pickle."""

from __future__ import annotations

import queue
from collections.abc import Callable

import msgspec

from kvkeep.engine.api import (
    Chunk,
    EngineStats,
    GenerateRequest,
    ModelInfo,
    Purged,
    TenantTerms,
    TokenLogprob,
)
from kvkeep.engine.guarded import Said
from kvkeep.sharing.ledger import Ballot


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue a request."""

    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request within a step."""

    request_id: str


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Let a request go on after tokens that another engine has generated; none: by itself."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of these tokens, where they were asked for."""
    counted: bool = False
    """Whether an engine that answered before has counted them."""


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Look at what has arrived beside the queue."""


class SetTenants(msgspec.Struct, frozen=True, tag=True):
    """Replace the tenants' reserved shares and terms."""

    shares: dict[str, float]
    terms: dict[str, TenantTerms] = {}


class Purge(msgspec.Struct, frozen=True, tag=True):
    """Drop all that is kept of a tenant."""

    tenant: str


class CloseEpoch(msgspec.Struct, frozen=True, tag=True):
    """Let the sharing policy's next epoch begin at a Unix time; answered by `Votes`."""

    epoch: int
    now: float


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Make public what came of all engines' votes; answered by `Published`."""

    state: bytes
    now: float


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for a snapshot."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the loop now."""


Command = (
    Submit | Cancel | Begin | Wake | SetTenants | Purge | CloseEpoch | Publish | GetStats | Stop
)


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Weights read so far, in bytes."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and warm."""

    info: ModelInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or died; `kind` is the error class's name."""

    kind: str
    message: str


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """A step's news: (request id, chunk)."""

    items: tuple[tuple[str, Chunk], ...]


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Answer to `GetStats`."""

    stats: EngineStats


class TenantsSet(msgspec.Struct, frozen=True, tag=True):
    """Answer to `SetTenants`; `error` says why nothing changed."""

    error: str | None


class PurgeDone(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Purge`."""

    purged: Purged


class Votes(msgspec.Struct, frozen=True, tag=True):
    """Answer to `CloseEpoch`: whose prompts had which chains, by names of both."""

    ballots: tuple[Ballot, ...]
    version: str
    """Of what has cleared them."""


class Published(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Publish`."""


class Verdict(msgspec.Struct, frozen=True, tag=True):
    """What the shadow of a sampled request has said, and that of a probe beside it.

    Told once for each such request that was taken; nothing said: it had none, or it does not count.
    """

    request_id: str
    said: tuple[Said, ...] = ()


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """The loop has ended as asked."""


Reply = (
    Loading
    | Ready
    | Failed
    | Outputs
    | Stats
    | TenantsSet
    | PurgeDone
    | Votes
    | Published
    | Verdict
    | Stopped
)

Inbox = queue.SimpleQueue[Command]
Sink = Callable[[Reply], None]

_ENCODER = msgspec.msgpack.Encoder()
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Command | Reply) -> bytes:
    """Return a message's bytes."""
    return _ENCODER.encode(message)


def decode_command(raw: bytes) -> Command:
    """Return the command in `raw`."""
    return _COMMANDS.decode(raw)


def decode_reply(raw: bytes) -> Reply:
    """Return the reply in `raw`."""
    return _REPLIES.decode(raw)
