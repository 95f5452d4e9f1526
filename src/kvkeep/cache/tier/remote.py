"""Sealed frames in a Redis or Valkey server, as `Frames`.

    kvkeep:SPACE:f:NAME     a record, as on a disk; expires by itself
    kvkeep:SPACE:s:SHELF    the names of one owner's pages

SPACE tells key stores apart, so that servers of other tenants take nothing from each other. The
server is never waited for longer than its timeouts; where it does not answer, calls fail at once
for a while, twice as long each time.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvkeep.cache.tier.frames import Away, Found, Place
from kvkeep.cache.tier.records import (
    HEADER_BYTES,
    BadRecord,
    Flag,
    Record,
    decode,
    encode,
    frame_of,
)
from kvkeep.errors import ConfigError

CONNECT_S: Final = 1.0
ANSWER_S: Final = 2.0
FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 30.0
"""Between two tries of a server that does not answer."""
AT_ONCE: Final = 500
"""Names in one exchange."""

log = logging.getLogger(__name__)


def client_of(url: str) -> redis.Redis:
    """Return a client that waits little and tries nothing twice.

    `REDIS_USERNAME` and `REDIS_PASSWORD` are the server's. Raises `ConfigError` where the URL names
    a password.
    """
    if urlsplit(url).password is not None:
        raise ConfigError(
            "tier: a password in the URL shows in lists of processes; set REDIS_PASSWORD"
        )
    try:
        return redis.Redis.from_url(
            url,
            username=os.environ.get("REDIS_USERNAME"),
            password=os.environ.get("REDIS_PASSWORD"),
            socket_connect_timeout=CONNECT_S,
            socket_timeout=ANSWER_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:
        raise ConfigError(f"tier: {url!r} is no address; use redis://HOST:PORT/DB") from None


class RemoteFrames:
    """All frames of one key store in a server; an index of their shelves is kept here."""

    unsynced_bytes = 0

    def __init__(
        self, client: redis.Redis, space: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises `ConfigError` where the server refuses us; one that is down may come later."""
        self.errors: Counter[str] = Counter()
        self._client = client
        self._clock = clock
        self._begin = b"kvkeep:" + space.hex().encode()
        self._shelves: dict[bytes, bytes] = {}
        self._owed: set[bytes] = set()
        """Shelves to be purged."""
        self._listed = False
        self._pause_s = FIRST_PAUSE_S
        self._not_before = float("-inf")
        try:
            client.ping()
        except (exceptions.AuthenticationError, exceptions.ResponseError) as error:
            raise ConfigError(f"tier: the server refuses us: {error}; set REDIS_PASSWORD") from None
        except exceptions.RedisError:
            log.warning("tier: the remote server does not answer yet; its pages are misses")

    def open(self, now: float) -> list[Found]:
        """Return what the server holds, none while it is away."""
        try:
            self._pay()
            with self._asking():
                found = list(self._list(now))
        except Away:
            return []
        self._listed = True
        self._shelves = {one.name: one.shelf for one in found}
        return sorted(found, key=lambda one: one.place.seq)

    def unread(self) -> bool:
        """Tell whether nothing was listed yet and the server may answer by now."""
        return not self._listed and self._clock() >= self._not_before

    def append(
        self, name: bytes, shelf: bytes, expires_s: float, frame: bytes | memoryview
    ) -> Place:
        """Write a page, and its name to its owner's; what a purge left over goes first."""
        self._pay()
        record = Record(name, shelf, time.time_ns(), expires_s, Flag.FRAME, len(frame))
        with self._asking():
            pipe = self._client.pipeline(transaction=False)
            until_ms = int(expires_s * 1000) if expires_s else None
            pipe.set(self._key(name), b"".join(encode(record, frame)), pxat=until_ms)
            pipe.sadd(self._set(shelf), name)
            pipe.execute()
        self._shelves[name] = shelf
        return Place(0, 0, len(frame), record.seq)

    def drop(self, name: bytes, seq: int) -> None:
        """Give up a page."""
        shelf = self._shelves.pop(name, None)
        with self._asking():
            pipe = self._client.pipeline(transaction=False)
            pipe.unlink(self._key(name))
            if shelf is not None:
                pipe.srem(self._set(shelf), name)
            pipe.execute()

    def purge(self, shelf: bytes) -> int:
        """Give up a shelf, whoever wrote its pages; what cannot be asked now is asked later."""
        self._owed.add(shelf)
        names = {name for name, own in self._shelves.items() if own == shelf}
        with self._asking():
            names |= self._answer(self._client.smembers(self._set(shelf)))
            for some in _batches(list(names)):
                self._client.unlink(*map(self._key, some))
            self._client.unlink(self._set(shelf))
        for name in names & self._shelves.keys():
            del self._shelves[name]
        self._owed.remove(shelf)
        return len(names)

    def read(self, name: bytes, place: Place, into: memoryview | None = None) -> memoryview:
        """Return a frame, in memory of its own; one that the server gave up is a bad record."""
        with self._asking():
            raw: bytes | None = self._answer(self._client.get(self._key(name)))
        if raw is None:
            raise BadRecord("gone")
        record = decode(raw)
        return frame_of(raw, name, place.seq if record is None else record.seq)

    def sync(self) -> None:
        """Nothing: what a server keeps over its own end is its own business."""

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _pay(self) -> None:
        """Do the purges that could not be done."""
        for shelf in tuple(self._owed):
            self.purge(shelf)

    def _list(self, now: float) -> Iterator[Found]:
        """Yield the pages by their records' headers."""
        keys = list(self._client.scan_iter(match=self._key(b"") + b"*", count=AT_ONCE))
        for some in _batches(keys):
            pipe = self._client.pipeline(transaction=False)
            for key in some:
                pipe.getrange(key, 0, HEADER_BYTES - 1)
                pipe.strlen(key)
            answers = pipe.execute()
            for key, header, size in zip(some, answers[::2], answers[1::2], strict=True):
                record = decode(header)
                if record is None or record.size != size or self._key(record.name) != key:
                    self.errors["record"] += 1
                elif not 0 < record.expires_s <= now:
                    place = Place(0, 0, record.length, record.seq)
                    yield Found(record.name, record.shelf, place, record.expires_s)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Ask the server; raises `Away` at once while it is given time, `OSError` for a refusal."""
        if self._clock() < self._not_before:
            raise Away
        try:
            yield
        except (
            exceptions.ConnectionError,
            exceptions.TimeoutError,
            exceptions.BusyLoadingError,
        ) as error:
            self._not_before = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            raise Away from error
        except exceptions.OutOfMemoryError as error:
            raise OSError(errno.ENOSPC, "the server is full") from error
        except exceptions.RedisError as error:
            raise OSError(errno.EIO, "the server refused") from error
        self._pause_s = FIRST_PAUSE_S

    def _key(self, name: bytes) -> bytes:
        return self._begin + b":f:" + name.hex().encode()

    def _set(self, shelf: bytes) -> bytes:
        return self._begin + b":s:" + shelf.hex().encode()

    @staticmethod
    def _answer(answer: Any) -> Any:
        """Return an answer: the client's types leave open whether it is one yet."""
        return answer


def _batches(every: list[bytes]) -> Iterator[list[bytes]]:
    for at in range(0, len(every), AT_ONCE):
        yield every[at : at + AT_ONCE]
