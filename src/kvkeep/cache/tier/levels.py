"""What each shelf may hold of one tier, holds, and would give up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping


class Level:
    """Names of pages by shelf, the least recently used first, within quotas of bytes.

    A shelf's contents depend on its own calls and its quota alone.
    """

    def __init__(self, name: str, limit_bytes: int, *, usable: float = 1.0) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.usable = usable
        """The part of it that pages may fill."""
        self.used_bytes = 0
        self._quotas: dict[bytes, int] = {}
        self._shelves: dict[bytes, OrderedDict[bytes, int]] = {}
        self._used: dict[bytes, int] = {}

    @property
    def pages(self) -> int:
        """Return how many pages there are."""
        return sum(map(len, self._shelves.values()))

    def quota(self, shelf: bytes) -> int:
        """Return how many bytes a shelf may hold."""
        return self._quotas.get(shelf, 0)

    def shelves(self) -> list[bytes]:
        """Return the shelves that hold something."""
        return list(self._shelves)

    def names(self, shelf: bytes) -> list[bytes]:
        """Return what a shelf holds, in its order."""
        return list(self._shelves.get(shelf, ()))

    def admit(self, shelf: bytes, name: bytes, size: int) -> list[bytes] | None:
        """Take a page of so many bytes; return what had to go for it, None where it cannot fit."""
        quota = self.quota(shelf)
        if size > quota:
            return None
        gone = self._shrink(shelf, quota - size)
        self.add(shelf, name, size)
        return gone

    def add(self, shelf: bytes, name: bytes, size: int) -> None:
        """Take a page whatever the quota says."""
        self.remove(shelf, name)
        self._shelves.setdefault(shelf, OrderedDict())[name] = size
        self._used[shelf] = self._used.get(shelf, 0) + size
        self.used_bytes += size

    def touch(self, shelf: bytes, name: bytes) -> bool:
        """Note that a page was used; False where it is not there."""
        own = self._shelves.get(shelf)
        if own is None or name not in own:
            return False
        own.move_to_end(name)
        return True

    def remove(self, shelf: bytes, name: bytes) -> bool:
        """Give up a page; False where it is not there."""
        own = self._shelves.get(shelf)
        if own is None or name not in own:
            return False
        size = own.pop(name)
        self._used[shelf] -= size
        self.used_bytes -= size
        if not own:
            del self._shelves[shelf], self._used[shelf]
        return True

    def set_quotas(self, quotas: Mapping[bytes, int]) -> list[bytes]:
        """Set what shelves may hold; return what must go of those that are named."""
        self._quotas.update(quotas)
        return [name for shelf, quota in quotas.items() for name in self._shrink(shelf, quota)]

    def _shrink(self, shelf: bytes, most: int) -> list[bytes]:
        gone: list[bytes] = []
        while self._used.get(shelf, 0) > most:
            name = next(iter(self._shelves[shelf]))
            self.remove(shelf, name)
            gone.append(name)
        return gone
