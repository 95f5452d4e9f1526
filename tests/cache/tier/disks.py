"""A directory in memory whose every operation can be made to fail, be cut short, or be the last.

And a service in memory.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvkeep.cache.tier.frames import Away, Found, Place
from kvkeep.cache.tier.records import BadRecord


class Killed(BaseException):
    """The process ends here; nothing may catch it."""


Plan = Callable[[str, int], None]
"""Hears of each operation by its name and number, and raises where it shall fail."""


def never(_: str, __: int) -> None:
    """Let everything succeed."""


def killed_at(number: int) -> Plan:
    """Return a plan that ends the process at an operation."""

    def plan(_: str, count: int) -> None:
        if count >= number:
            raise Killed

    return plan


def failing(what: str, code: int, *, first: int = 0) -> Plan:
    """Return a plan under which one kind of operation fails, from its number `first` on."""
    seen = iter(range(1 << 30))

    def plan(kind: str, _: int) -> None:
        if kind == what and next(seen) >= first:
            raise OSError(code, errno.errorcode[code])

    return plan


@dataclass
class Disk:
    """Files by name; implements `Files`."""

    files: dict[str, bytearray] = field(default_factory=dict)
    durable: dict[str, bytes] = field(default_factory=dict)
    """As they were when they were last synced."""
    plan: Plan = never
    most: int = 1 << 30
    """Bytes that one write takes at most."""
    count: int = 0

    def step(self, kind: str) -> None:
        self.count += 1
        self.plan(kind, self.count)

    def names(self) -> list[str]:
        self.step("names")
        return sorted(self.files)

    def open(self, name: str) -> Handle:
        self.step("open")
        self.files.setdefault(name, bytearray())
        return Handle(self, name, self.files[name])

    def remove(self, name: str) -> None:
        self.step("remove")
        self.files.pop(name, None)
        self.durable.pop(name, None)

    def sync(self) -> None:
        self.step("sync")

    def close(self) -> None:
        self.plan = never

    @contextmanager
    def during(self, plan: Plan) -> Iterator[None]:
        """Follow a plan for a while."""
        self.plan, self.count = plan, 0
        try:
            yield
        finally:
            self.plan = never

    def lose_power(self) -> None:
        """Lose what was not synced: it reads as zeros, as a file system may leave it."""
        for name, data in self.files.items():
            kept = self.durable.get(name, b"")
            data[:] = kept + bytes(len(data) - len(kept))


@dataclass
class Handle:
    """One open file; implements `File`."""

    disk: Disk
    name: str
    data: bytearray

    def write(self, offset: int, data: memoryview) -> int:
        taken = min(len(data), self.disk.most)
        try:
            self.disk.step("write")
        except BaseException:
            self._put(offset, data[: taken // 2])  # half of it was written
            raise
        self._put(offset, data[:taken])
        return taken

    def read(self, offset: int, length: int) -> bytes:
        self.disk.step("read")
        return bytes(self.data[offset : offset + length])

    def fill(self, offset: int, into: memoryview) -> int:
        found = self.read(offset, len(into))
        into[: len(found)] = found
        return len(found)

    def size(self) -> int:
        return len(self.data)

    def truncate(self, size: int) -> None:
        self.disk.step("truncate")
        del self.data[size:]

    def sync(self) -> None:
        self.disk.step("sync")
        self.disk.durable[self.name] = bytes(self.data)

    def _put(self, offset: int, data: memoryview) -> None:
        if len(self.data) < offset:
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data


@dataclass
class Service:
    """Frames by name; outlives those who use it, and can be away, full or wrong."""

    kept: dict[bytes, tuple[bytes, float, int, bytes]] = field(default_factory=dict)
    """(shelf, expires, seq, frame)."""
    away: bool = False
    full: bool = False
    unsynced_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def open(self, now: float) -> list[Found]:
        return [
            Found(name, shelf, Place(0, 0, len(frame), seq), expires_s)
            for name, (shelf, expires_s, seq, frame) in self.kept.items()
            if not 0 < expires_s <= now
        ]

    def append(
        self, name: bytes, shelf: bytes, expires_s: float, frame: bytes | memoryview
    ) -> Place:
        self._ask()
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        seq = 1 + max((one[2] for one in self.kept.values()), default=0)
        self.kept[name] = (shelf, expires_s, seq, bytes(frame))
        return Place(0, 0, len(frame), seq)

    def drop(self, name: bytes, seq: int) -> None:
        self._ask()
        self.kept.pop(name, None)

    def purge(self, shelf: bytes) -> int:
        self._ask()
        gone = [name for name, one in self.kept.items() if one[0] == shelf]
        for name in gone:
            del self.kept[name]
        return len(gone)

    def read(self, name: bytes, place: Place, into: memoryview | None = None) -> memoryview:
        self._ask()
        if name not in self.kept:
            raise BadRecord("gone")
        return memoryview(self.kept[name][3])

    def sync(self) -> None:
        pass

    def unread(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def _ask(self) -> None:
        if self.away:
            raise Away
