"""Which pages there are, in which levels, and what has to go: an owner's own doings decide.

The engine's thread alone changes any of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvkeep.cache.accounts import Retention
from kvkeep.cache.tier.frames import Place
from kvkeep.cache.tier.levels import Level
from kvkeep.cache.tier.records import record_bytes

MEMORY: Final = "memory"
"""The level whose frames lie in memory; others have places."""


@dataclass(slots=True, eq=False)
class Entry:
    """A page by its name; where it is."""

    name: bytes
    shelf: bytes
    expires_s: float
    """Unix time; 0: never."""
    on: set[str] = field(default_factory=set)
    """Levels that have room for it; its frame may still be on its way there."""
    page: memoryview | None = None
    """Its layers one after another, copied and not yet sealed."""
    readers: int = 0
    """That are still to be handed parts of `page`."""
    frame: memoryview | None = None
    places: dict[str, Place] = field(default_factory=dict)
    """By level, memory aside."""
    gone: bool = False

    @property
    def there(self) -> bool:
        """Tell whether its bytes can be had."""
        return self.page is not None or self.frame is not None or bool(self.places)


class Index:
    """All pages by name, and the levels they are in, the nearest first."""

    def __init__(self, levels: Sequence[Level], drop: Callable[[str, bytes, Place], None]) -> None:
        """`drop` hears of a place in a level that is given up."""
        self.levels = tuple(levels)
        self.entries: dict[bytes, Entry] = {}
        self._drop = drop
        self._expiring: list[tuple[float, bytes]] = []

    @property
    def lower(self) -> list[Level]:
        """Return the levels below memory."""
        return [level for level in self.levels if level.name != MEMORY]

    def add(self, entry: Entry) -> None:
        """Know a page."""
        self.entries[entry.name] = entry
        self.expire(entry, entry.expires_s)

    def expire(self, entry: Entry, expires_s: float) -> None:
        """Set from when a page is not to be found; 0: always."""
        entry.expires_s = expires_s
        if expires_s:
            heapq.heappush(self._expiring, (expires_s, entry.name))

    def expired(self, now: float) -> None:
        """Give up pages whose time is over."""
        while self._expiring and self._expiring[0][0] <= now:
            _, name = heapq.heappop(self._expiring)
            entry = self.entries.get(name)
            if entry is not None and 0 < entry.expires_s <= now:
                self.remove(entry)

    def touch(self, entry: Entry) -> None:
        """Note that a page was used."""
        for level in self.levels:
            level.touch(entry.shelf, entry.name)

    def admit(self, level: Level, entry: Entry, frame_bytes: int) -> bool:
        """Make room for a page in a level at the cost of its shelf's oldest."""
        size = frame_bytes if level.name == MEMORY else record_bytes(frame_bytes)
        gone = level.admit(entry.shelf, entry.name, size)
        if gone is None:
            return False
        entry.on.add(level.name)
        self._left(level, gone)
        return True

    def take_back(self, level: Level, entry: Entry, place: Place) -> None:
        """Note that a page lies in a level since before, whatever its quota says."""
        entry.on.add(level.name)
        entry.places[level.name] = place
        level.add(entry.shelf, entry.name, record_bytes(place.length))

    def leave(self, name: str, entry: Entry) -> None:
        """Give up a page in one level; it goes where that was the last one."""
        level = next(one for one in self.levels if one.name == name)
        level.remove(entry.shelf, entry.name)
        self._left(level, (entry.name,))

    def remove(self, entry: Entry, *, note: bool = True) -> None:
        """Take a page out; `note`: at its places too."""
        for level in self.levels:
            level.remove(entry.shelf, entry.name)
        if note:
            for name, place in entry.places.items():
                self._drop(name, entry.name, place)
        entry.gone, entry.page, entry.frame = True, None, None
        entry.places.clear()
        del self.entries[entry.name]

    def forget(self, shelf: bytes) -> int:
        """Take a shelf's pages out, their places aside; return how many."""
        names = {name for level in self.levels for name in level.names(shelf)}
        for name in names:
            self.remove(self.entries[name], note=False)
        return len(names)

    def set_quotas(
        self, shares: Mapping[bytes, tuple[float, Retention]], *, strangers_stay: bool
    ) -> None:
        """Set each shelf's part of every level; pages of shelves that have none go, or stay."""
        for level in self.levels:
            room = level.limit_bytes * level.usable
            near = level.name == MEMORY
            quotas = {
                shelf: int(share * room) * (terms.to_tier and (near or terms.to_disk))
                for shelf, (share, terms) in shares.items()
            }
            strangers = () if strangers_stay else set(level.shelves()) - quotas.keys()
            self._left(level, level.set_quotas({**dict.fromkeys(strangers, 0), **quotas}))

    def _left(self, level: Level, names: Iterable[bytes]) -> None:
        """Take note that pages are no longer in a level."""
        for name in names:
            entry = self.entries[name]
            entry.on.discard(level.name)
            place = entry.places.pop(level.name, None)
            if place is not None:
                self._drop(level.name, name, place)
            if level.name == MEMORY:
                entry.frame = None
            if not entry.on:
                self.remove(entry)
