"""What crosses between a server and its key process: tagged records in frames of bounded length."""

from __future__ import annotations

import socket
from typing import Literal

import msgspec

from kvkeep.errors import ConfigError, KeysGone, KeysUnavailable, SealError, unexpected

MAX_FRAME_BYTES = 1 << 20
"""Of one message; a longer one ends the connection."""

_LENGTH_BYTES = 4


class Begin(msgspec.Struct, frozen=True, tag=True):
    """What the key process works with; the first message."""

    provider: str
    store: str
    epoch_s: float
    given: bytes = b""
    """What wraps the store's roots, of a cluster's worker; it has no provider."""


class OpenModel(msgspec.Struct, frozen=True, tag=True):
    """Ask for the key of a sealed checkpoint; the first message, and the last."""

    provider: str
    model_id: str
    wrapped: bytes


class Fresh(msgspec.Struct, frozen=True, tag=True):
    """Ask for keys of pages to be sealed."""

    owner: str
    page_ids: tuple[bytes, ...]


class Known(msgspec.Struct, frozen=True, tag=True):
    """Ask for keys of pages that were sealed; (page id, generation) of each."""

    owner: str
    epoch: int
    pages: tuple[tuple[bytes, int], ...]


class NameKey(msgspec.Struct, frozen=True, tag=True):
    """Ask for the key of an owner's names."""

    owner: str


class ListOwners(msgspec.Struct, frozen=True, tag=True):
    """Ask who has keys."""


class Rotate(msgspec.Struct, frozen=True, tag=True):
    """Begin a new epoch for an owner."""

    owner: str


class AskWorker(msgspec.Struct, frozen=True, tag=True):
    """Ask for what a cluster's worker is to be given."""

    worker: str


class Shred(msgspec.Struct, frozen=True, tag=True):
    """Destroy all keys of a tenant."""

    tenant: str


class GetStatus(msgspec.Struct, frozen=True, tag=True):
    """Ask how the key process stands."""


Request = (
    Begin
    | OpenModel
    | Fresh
    | Known
    | NameKey
    | ListOwners
    | Rotate
    | AskWorker
    | Shred
    | GetStatus
)


class Granted(msgspec.Struct, frozen=True, tag=True):
    """Page keys, 64 bytes each, one after another."""

    key_id: str
    epoch: int
    material: memoryview
    newest: int = 0
    """The owner's newest epoch, where keys of an older one were asked for."""


class ModelKey(msgspec.Struct, frozen=True, tag=True):
    """The key of a sealed checkpoint."""

    key: memoryview


class Named(msgspec.Struct, frozen=True, tag=True):
    """An owner's name key."""

    key_id: str
    key: bytes


class Owners(msgspec.Struct, frozen=True, tag=True):
    """Who has keys, and the key by which all are filed."""

    owners: tuple[str, ...]
    shelf: bytes


class Rotated(msgspec.Struct, frozen=True, tag=True):
    """The epoch that began."""

    epoch: int


class WorkerKey(msgspec.Struct, frozen=True, tag=True):
    """What wraps the roots in a worker's store."""

    key: bytes


class Receipt(msgspec.Struct, frozen=True, tag=True):
    """What was destroyed, as a signed JSON document."""

    document: bytes


class Status(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """How the key process stands."""

    provider: str
    key_memory: str
    owners: int
    granted: int
    refused: int
    provider_failures: int
    provider_down: bool


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Why there is no answer."""

    kind: Literal["config", "gone", "unavailable", "seal"]
    message: str


Reply = Granted | ModelKey | Named | Owners | Rotated | WorkerKey | Receipt | Status | Refused

_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def send(channel: socket.socket, message: Request | Reply) -> None:
    """Write one message."""
    raw = _ENCODER.encode(message)
    if len(raw) > MAX_FRAME_BYTES:
        raise OSError("a message of the key process is too long")
    channel.sendall(len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)


def receive_request(channel: socket.socket) -> Request:
    """Return the next request; raises `EOFError` at the end, `OSError` for what is none."""
    try:
        return _REQUESTS.decode(_receive(channel))
    except msgspec.MsgspecError as error:
        raise OSError("a request to the key process can't be read") from error


def receive_reply(channel: socket.socket) -> Reply:
    """Return the next reply; a page key in it lies in memory of the reply's own."""
    try:
        return _REPLIES.decode(_receive(channel))
    except msgspec.MsgspecError as error:
        raise OSError("a reply of the key process can't be read") from error


def refusal(error: Exception) -> Refused:
    """Return an error as a reply; the words of an unexpected one stay inside."""
    match error:
        case ConfigError():
            return Refused("config", str(error))
        case KeysGone():
            return Refused("gone", str(error))
        case KeysUnavailable():
            return Refused("unavailable", str(error))
        case SealError():
            return Refused("seal", str(error))
        case _:
            return Refused("unavailable", f"the key process failed: {unexpected(error)}")


def raised(refused: Refused) -> ConfigError | SealError:
    """Return a refusal as the error that it was."""
    kinds: dict[str, type[ConfigError | SealError]] = {
        "config": ConfigError,
        "gone": KeysGone,
        "unavailable": KeysUnavailable,
    }
    return kinds.get(refused.kind, SealError)(refused.message)


def _receive(channel: socket.socket) -> bytearray:
    size = int.from_bytes(_exactly(channel, _LENGTH_BYTES), "little")
    if size > MAX_FRAME_BYTES:
        raise OSError("a message of the key process is too long")
    return _exactly(channel, size)


def _exactly(channel: socket.socket, size: int) -> bytearray:
    raw = bytearray(size)
    view, at = memoryview(raw), 0
    while at < size:
        count = channel.recv_into(view[at:])
        if not count:
            raise EOFError
        at += count
    return raw
