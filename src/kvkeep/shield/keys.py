"""A server's side of the key process: page keys for one call, name keys, nothing above them."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kvkeep.errors import ConfigError, KeysGone, KeysUnavailable, SealError
from kvkeep.sealing import KeyState
from kvkeep.shield import wire as w
from kvkeep.shield.cipher import MATERIAL_BYTES, PageKey, Pages
from kvkeep.shield.issue import EPOCH_S

ANSWER_S = 10.0
"""How long the key process may take; then it is taken for dead."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
"""Between two starts of a key process that dies again; the pause doubles."""
WARM_S = 5.0

_R = TypeVar("_R", bound=w.Reply)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class KeyCounts:
    """What happened to the key process and its answers."""

    starts: int = 0
    deaths: int = 0
    gone: int = 0
    """Requests for keys that were destroyed."""
    unavailable: int = 0
    """Requests that nobody answered: the key process or its provider is down."""


class KeyClient:
    """Starts the key process, asks it, and starts it again where it died; a `KeySource`."""

    def __init__(
        self,
        provider: str,
        store: str,
        *,
        epoch_s: float = EPOCH_S,
        given: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`given` stands in the provider's place for a cluster's worker."""
        self.counts = KeyCounts()
        self._begin = w.Begin(provider, store, epoch_s, given)
        self._clock = clock
        self._asking = threading.Lock()
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = FIRST_PAUSE_S
        self._not_before = float("-inf")
        self._closed = False
        self._told = ("", "")
        self._refused = False
        self._names: dict[str, tuple[str, bytes]] = {}
        self._shelf: bytes | None = None
        self._wanted: set[str] = set()
        self._wake = threading.Event()
        self._fetcher: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Return the key process's number; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def state(self) -> KeyState:
        """Return how the key process stands, as far as is known without asking it."""
        provider, memory = self._told
        running = self._channel is not None
        answering = running and not self._refused
        return KeyState(provider, memory, running, answering, self.counts.starts)

    def start(self) -> w.Status:
        """Start the key process and learn every owner's name key; raises `ConfigError`."""
        try:
            with self._asking:
                _, status = self._connect()
        except KeysUnavailable as error:
            raise ConfigError(f"shield: the key process can't be started: {error}") from None
        self._fetcher = threading.Thread(target=self._fetch, name="kvkeep-names", daemon=True)
        self._fetcher.start()
        deadline = self._clock() + WARM_S
        known = self._ask(w.ListOwners(), w.Owners)
        self._shelf = known.shelf
        for owner in known.owners:
            if self._clock() > deadline:
                self.name_key(owner)
            else:
                self._learn(owner)
        return status

    def close(self) -> None:
        """End the key process."""
        self._closed = True
        self._wake.set()
        if self._fetcher is not None:
            self._fetcher.join(ANSWER_S)
        with self._asking:
            self._end()

    def name_key(self, owner: str) -> bytes | None:
        """Return the key of an owner's names; None, and fetched soon, while it is not at hand."""
        known = self._names.get(owner)
        if known is not None:
            return known[1]
        self._wanted.add(owner)
        self._wake.set()
        return None

    def shelf_key(self) -> bytes | None:
        """Return the key by which owners are filed; None before the key process first began."""
        return self._shelf

    def fresh(self, owner: str, page_id: bytes) -> PageKey:
        """Return the key of a page to be sealed."""
        return self._granted(owner, w.Fresh(owner, (page_id,)))[0]

    def known(self, owner: str, epoch: int, pages: Pages) -> list[PageKey]:
        """Return the keys of pages that were sealed, asked for in one message."""
        return self._granted(owner, w.Known(owner, epoch, tuple(pages)))

    def rotate(self, owner: str) -> int:
        """Begin a new epoch for an owner; returns its number."""
        return self._ask(w.Rotate(owner), w.Rotated).epoch

    def shred(self, tenant: str) -> bytes:
        """Destroy a tenant's keys; returns the receipt. Raises `ConfigError` where it has none."""
        reply = self._ask(w.Shred(tenant), w.Receipt)
        for owner in list(self._names):
            if owner == tenant or owner.startswith(f"{tenant}/"):
                self._names.pop(owner, None)
        return reply.document

    def worker_key(self, worker: str) -> bytes:
        """Return what wraps the roots in a worker's store, which is made where there is none."""
        return self._ask(w.AskWorker(worker), w.WorkerKey).key

    def status(self) -> w.Status:
        """Return how the key process stands."""
        return self._ask(w.GetStatus(), w.Status)

    def _granted(self, owner: str, request: w.Fresh | w.Known) -> list[PageKey]:
        try:
            reply = self._ask(request, w.Granted)
        except KeysGone:
            self.counts.gone += 1
            self._refused = False
            self._names.pop(owner, None)
            raise
        except KeysUnavailable:
            self.counts.unavailable += 1
            self._refused = True
            raise
        self._refused = False
        name = self._names.get(owner)
        if name is not None and name[0] != reply.key_id:
            self._names.pop(owner, None)
        return [
            PageKey(reply.epoch, reply.material[at : at + MATERIAL_BYTES], reply.newest)
            for at in range(0, len(reply.material), MATERIAL_BYTES)
        ]

    def _ask(self, request: w.Request, kind: type[_R]) -> _R:
        """Return the key process's answer of this kind; a refusal is raised as what it says."""
        with self._asking:
            reply = self._exchange(self._channel or self._connect_again(), request)
        return _of_kind(reply, kind)

    def _exchange(self, channel: socket.socket, request: w.Request) -> w.Reply:
        try:
            w.send(channel, request)
            return w.receive_reply(channel)
        except (EOFError, OSError) as error:
            self.counts.deaths += 1
            self._end()
            self._not_before = self._clock() + self._pause_s
            log.warning("the key process died; sealed pages are misses until it runs again")
            raise KeysUnavailable("the key process died") from error

    def _connect_again(self) -> socket.socket:
        if self._closed or self._clock() < self._not_before:
            raise KeysUnavailable("the key process is down")
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._not_before = self._clock() + self._pause_s
        try:
            channel, _ = self._connect()
        except ConfigError as error:
            raise KeysUnavailable(f"the key process can't be started again: {error}") from None
        self._pause_s = FIRST_PAUSE_S
        return channel

    def _connect(self) -> tuple[socket.socket, w.Status]:
        """Start the process and hand it what it works with; raises `ConfigError`."""
        ours, self._process = _spawned()
        self._channel = ours
        self.counts.starts += 1
        reply = self._exchange(ours, self._begin)
        if isinstance(reply, w.Refused):
            self._end()
            raise ConfigError(reply.message)
        status = _of_kind(reply, w.Status)
        self._told = (status.provider, status.key_memory)
        return ours, status

    def _end(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _learn(self, owner: str) -> None:
        """Fetch an owner's name key; without one its pages are misses until the next try."""
        try:
            reply = self._ask(w.NameKey(owner), w.Named)
        except (ConfigError, SealError):
            return
        self._names[owner] = (reply.key_id, reply.key)

    def _fetch(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            while self._wanted and not self._closed:
                owner = self._wanted.pop()
                self._learn(owner)
                if owner not in self._names:
                    time.sleep(FIRST_PAUSE_S)


def unwrap_model(provider: str, model_id: str, wrapped: bytes) -> memoryview:
    """Return the key of a sealed checkpoint, writable: unwrapped by a key process of its own.

    Raises `SealError` where the provider does not open it, `ConfigError` where it can't be used.
    """
    channel, process = _spawned()
    with channel:
        try:
            w.send(channel, w.OpenModel(provider, model_id, wrapped))
            reply = w.receive_reply(channel)
        except (EOFError, OSError) as error:
            process.kill()
            raise KeysUnavailable("the key process died") from error
        finally:
            process.wait(ANSWER_S)
    return _of_kind(reply, w.ModelKey).key


def _spawned() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a key process; returns our end of what connects it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - this program's own module
            [sys.executable, "-P", "-m", "kvkeep.shield.keeper", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
    ours.settimeout(ANSWER_S)
    return ours, process


def _of_kind(reply: w.Reply, kind: type[_R]) -> _R:
    if isinstance(reply, w.Refused):
        raise w.raised(reply)
    if not isinstance(reply, kind):
        raise KeysUnavailable("the key process answered something else")
    return reply
