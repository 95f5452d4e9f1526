"""The key process: holds every key above a page's in memory that no other process can read.

Started as `python -P -m kvkeep.shield.keeper FD`, where FD is one end of a socket pair; it ends
when the other end closes. It imports no torch and nothing of the engine.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from kvkeep.errors import KvkeepError
from kvkeep.shield import envelope
from kvkeep.shield import wire as w
from kvkeep.shield.keyring import Keyring
from kvkeep.shield.opened import OpenedStore, opened, opened_by_worker
from kvkeep.shield.providers.make import make_provider
from kvkeep.shield.providers.provider import parse_spec
from kvkeep.shield.secret import SecretRegion, forbid_dumps
from kvkeep.shield.workers import is_worker

MODEL_SLOTS = 8
"""Of secret memory, where a checkpoint is opened."""


class Keeper:
    """Answers requests over one keyring."""

    def __init__(self, begin: w.Begin, opened: OpenedStore) -> None:
        self._opened = opened
        self._ring = Keyring(opened.store, opened.provider, opened.region, epoch_s=begin.epoch_s)

    def answer(self, request: w.Request) -> w.Reply:
        """Return the reply to a request; what goes wrong is a `Refused`."""
        try:
            return self._answer(request)
        except Exception as error:  # noqa: BLE001 - the server is told, and the process goes on
            return w.refusal(error)

    def _answer(self, request: w.Request) -> w.Reply:
        match request:
            case w.Fresh(owner, page_ids):
                key_id, epoch, made = self._ring.fresh(owner, page_ids)
                return w.Granted(key_id, epoch, memoryview(b"".join(made)))
            case w.Known(owner, epoch, pages):
                key_id, made = self._ring.known(owner, epoch, pages)
                newest = self._ring.newest(owner)
                return w.Granted(key_id, epoch, memoryview(b"".join(made)), newest)
            case w.NameKey(owner):
                return w.Named(*self._ring.name_key(owner))
            case w.ListOwners():
                owners = tuple(o for o in self._ring.owners() if not is_worker(o))
                return w.Owners(owners, self._opened.shelf)
            case w.Rotate(owner):
                return w.Rotated(self._ring.rotate(owner))
            case w.AskWorker(worker):
                return w.WorkerKey(self._opened.worker_key(worker))
            case w.Shred(tenant):
                return w.Receipt(self._opened.shred(tenant))
            case _:
                return self._status()

    def _status(self) -> w.Status:
        counts = self._ring.counts
        return w.Status(
            provider=self._opened.store.read().provider,
            key_memory=self._opened.region.kind,
            owners=len(self._ring.owners()),
            granted=counts.granted,
            refused=counts.refused,
            provider_failures=counts.provider_failures,
            provider_down=self._ring.provider_down,
        )


def serve(channel: socket.socket) -> None:
    """Answer one server until it goes away, or says what can't be read."""
    begin = w.receive_request(channel)
    if isinstance(begin, w.OpenModel):
        w.send(channel, _model_key(begin))
        return
    if not isinstance(begin, w.Begin):
        raise OSError("the first message to the key process must be its beginning")
    try:
        path = Path(begin.store)
        with (
            opened_by_worker(path, begin.given)
            if begin.given
            else opened(path, parse_spec(begin.provider))
        ) as store:
            _answer_all(channel, Keeper(begin, store))
    except KvkeepError as error:
        w.send(channel, w.refusal(error))


def _model_key(asked: w.OpenModel) -> w.Reply:
    """Return the key of a sealed checkpoint: by its label no other key is ever given out."""
    region = SecretRegion(MODEL_SLOTS)
    try:
        provider = make_provider(parse_spec(asked.provider), region)
        key = region.view(region.take())
        provider.unwrap(asked.wrapped, envelope.model_label(asked.model_id), key)
        return w.ModelKey(memoryview(bytes(key)))
    except Exception as error:  # noqa: BLE001 - the one who asked is told
        return w.refusal(error)
    finally:
        region.close()


def _answer_all(channel: socket.socket, keeper: Keeper) -> None:
    w.send(channel, keeper.answer(w.GetStatus()))
    while True:
        w.send(channel, keeper.answer(w.receive_request(channel)))


def main(arguments: Sequence[str]) -> int:
    """Serve the socket with this descriptor; the terminal's Ctrl-C is the server's to handle."""
    forbid_dumps()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=int(arguments[0]))
    try:
        serve(channel)
    except (EOFError, OSError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
