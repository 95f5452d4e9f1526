"""Pages below memory: sealed frames in host memory and on a disk, one index over both.

The index, the quotas and the order in which pages go are changed by the engine's thread alone,
and depend on what an owner did alone. Sealing, writing, reading and opening happen on other
threads; what they found is taken in by `poll`, a bounded number of bytes at a time.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from kvkeep.cache.accounts import Retention
from kvkeep.cache.pace import Pace
from kvkeep.cache.tier.backroom import Backroom, Entry, Failure, Reading, Sealed
from kvkeep.cache.tier.buffers import Buffers
from kvkeep.cache.tier.copies import LateCopy, PageCopy
from kvkeep.cache.tier.files import Files
from kvkeep.cache.tier.frames import Found, Frames, Place
from kvkeep.cache.tier.levels import Level
from kvkeep.cache.tier.lowest import TierSizes, lowest_of
from kvkeep.cache.tier.records import record_bytes
from kvkeep.cache.tiers import Copy, Install, Read, Surroundings, TierUse
from kvkeep.sealing import PageSealer, SealContext

POLL_BYTES: Final = 1 << 20
"""Installed in a short step; at least one layer."""
MOST_BYTES: Final = 64 << 20
"""In a long one."""
QUEUE_BYTES: Final = 128 << 20
"""Copied and not yet written, over all owners; each has its share of it, and at least one page."""


class TieredPages:
    """A `Tier` and its `TierControl`."""

    def __init__(
        self,
        sealer: PageSealer,
        sizes: TierSizes,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
        ended: Callable[[], None] = lambda: None,
        look: Callable[[], Surroundings] = Surroundings,
        remote: Frames | None = None,
    ) -> None:
        """`files`: of the disk tier, or `remote`: read at once; raises `OSError` where that fails.

        `ended` is called once nothing is sealed or opened any more; `look` tells what it is on.
        """
        self.asleep = False
        """Nothing is taken or found while it is set."""
        self._sealer = sealer
        self._clock = clock
        self._ended = ended
        self._look = look
        self._memory = Level("memory", sizes.memory_bytes) if sizes.memory_bytes else None
        lowest = lowest_of(sizes, files, remote)
        self._disk, self._usable = lowest.level, lowest.usable  # what is remote, perhaps
        self._levels = [level for level in (self._memory, self._disk) if level is not None]
        self._entries: dict[bytes, Entry] = {}
        self._expiring: list[tuple[float, bytes]] = []
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._buffers = Buffers()
        self._pace = Pace(POLL_BYTES, MOST_BYTES)
        self._shares: dict[str, float] = {}
        self._terms: dict[str, Retention] = {}
        self._nameless = False
        """Whether some account's shelf could not be named when quotas were set."""
        self._queue_bytes: dict[bytes, int] = {}
        self._renewed = 0
        self._back = Backroom(sealer, lowest.make, self._move, self._take_back, clock)

    # What the cache asks

    def holds(self, context: SealContext) -> bool:
        """Tell at once whether a page could be fetched."""
        entry = self._find(context)
        return entry is not None and entry.there

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        """Start to fetch a page, see `Tier.fetch`."""
        entry = self._find(context)
        if entry is None or not entry.there:
            done(False)
            return
        near = entry.page is not None or entry.frame is not None
        lower = "disk" if self._disk is None else self._disk.name
        level = "memory" if self._memory is not None and near else lower
        for one in self._levels:
            one.touch(entry.shelf, entry.name)
        if not entry.in_memory and entry.place is not None:
            entry.in_memory = self._admit(self._memory, entry, entry.place.length)
        reading = Reading(entry, context, layer_bytes, entry.place, install, done, level)
        if entry.page is not None:
            self._back.hand_over(reading, entry.page, self._opened)
        else:
            reading = reading._replace(into=self._buffers.take(sum(layer_bytes)))
            self._back.open(reading, entry.frame, self._opened, self._failed)

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> Copy | None:
        """Make room for a page that nothing uses any more, see `Tier.store`."""
        if self.asleep:
            return None
        name, shelf = self._sealer.name_of(context), self._sealer.shelf_of(context.owner)
        if name is None or shelf is None:
            return LateCopy(self, context, layer_bytes, read, expires_s)
        known = self._entries.get(name)
        if known is not None and (known.on_disk or not self._may(self._disk, shelf)):
            known.expires_s = expires_s or 0.0
            self._watch(known)
            for level in self._levels:
                level.touch(shelf, name)
            return None
        if known is not None:
            self._remove(known)
        page_bytes = sum(layer_bytes)
        self._back.prepare(page_bytes, self._buffers.lacks(page_bytes), self._buffers.give_back)
        entry = Entry(name, shelf, expires_s or 0.0)
        frame_bytes = self._sealer.frame_bytes(layer_bytes)
        entry.in_memory = self._admit(self._memory, entry, frame_bytes)
        entry.on_disk = self._admit(self._disk, entry, record_bytes(frame_bytes))
        if not entry.in_memory and not entry.on_disk:
            self._drops["quota"] += 1
            return None
        self._entries[name] = entry
        self._watch(entry)
        return PageCopy(self, entry, context, layer_bytes, read)

    def forget(self, owner: str) -> int:
        """Drop every page of an owner; return how many."""
        shelf = None if self.asleep else self._sealer.shelf_of(owner)
        if shelf is None:
            return 0
        names = {name for level in self._levels for name in level.names(shelf)}
        for name in names:
            self._remove(self._entries[name], note=False)
        self._back.purge(shelf)
        return len(names)

    def poll(self) -> None:
        """Take in what the threads have found, a bounded part of it."""
        budget = self._pace.budget()
        self._back.poll(budget.most_bytes, partial(self._pace.over, budget))

    # What the engine asks

    def set_shares(self, shares: Mapping[str, float], terms: Mapping[str, Retention]) -> None:
        """Set each account's part of every tier, and how far down its pages may go."""
        self._shares, self._terms = dict(shares), dict(terms)
        if self.asleep or not shares:
            return
        shelves = {name: self._sealer.shelf_of(name) for name in shares}
        self._nameless = None in shelves.values()
        memory: dict[bytes, int] = {}
        disk: dict[bytes, int] = {}
        for name, shelf in shelves.items():
            if shelf is None:
                continue
            own, term = shares[name], terms.get(name, Retention())
            self._queue_bytes[shelf] = int(own * QUEUE_BYTES)
            if self._memory is not None:
                memory[shelf] = int(own * self._memory.limit_bytes) * term.to_tier
            if self._disk is not None:
                usable = self._disk.limit_bytes * self._usable
                disk[shelf] = int(own * usable) * (term.to_tier and term.to_disk)
        self._resize(self._memory, memory)
        self._resize(self._disk, disk)

    def end_epoch(self, now: float) -> None:
        """Give up pages whose time is over; name the accounts whose keys were not there before."""
        if self._nameless:
            self.set_shares(self._shares, self._terms)
        while self._expiring and self._expiring[0][0] <= now:
            _, name = heapq.heappop(self._expiring)
            entry = self._entries.get(name)
            if entry is not None and 0 < entry.expires_s <= now:
                self._remove(entry)

    def due(self) -> bool:
        """Tell whether `poll` has something to do."""
        return self._back.due()

    def uses(self) -> tuple[TierUse, ...]:
        """Return the figures of every tier; what concerns all stands with the last."""
        found = []
        around = self._look()
        for level in self._levels:
            last = level is self._levels[-1]
            found.append(
                TierUse(
                    level.name,
                    level.limit_bytes,
                    level.used_bytes,
                    level.pages,
                    self._hits[level.name],
                    self._misses[level.name],
                    tuple(sorted(self._drops.items())) if last else (),
                    tuple(sorted(self._back.errors().items())) if last else (),
                    self._renewed if last else 0,
                    around.room if level is self._disk else None,
                    around.keys,
                )
            )
        return tuple(found)

    def close(self, wait_s: float) -> None:
        """Write what was taken, for so long at most, and end."""
        self._back.close(wait_s)
        self._ended()

    # What a copy asks

    def has_room(self, entry: Entry, size: int) -> bool:
        """Tell whether a shelf may have so many bytes more on their way."""
        most = self._queue_bytes.get(entry.shelf, 0)
        return self._back.queue.has_room(entry.shelf, size, most)

    def take(
        self,
        entry: Entry,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
    ) -> None:
        """Copy a page."""
        page = self._buffers.take(sum(layer_bytes))
        read(page)
        entry.page = page
        self._back.seal(entry, context, page, layer_bytes, partial(self._stored, entry, page))

    def can_name(self, context: SealContext) -> bool:
        """Tell whether the keys of a page's names are at hand."""
        named = self._sealer.name_of(context), self._sealer.shelf_of(context.owner)
        return None not in named

    def lose(self, entry: Entry | None, why: str | None = None) -> None:
        """Give up a page that was not copied; `why` is counted."""
        if why is not None:
            self._drops[why] += 1
        if entry is not None and not entry.gone:
            self._remove(entry)

    # What the threads found

    def _take_back(self, pages: list[Found]) -> None:
        """Index what outlived a restart, within the quotas that are set by now."""
        for found in pages:
            if self._disk is None or found.name in self._entries:
                continue
            entry = Entry(found.name, found.shelf, found.expires_s, on_disk=True)
            entry.place = found.place
            self._entries[found.name] = entry
            self._watch(entry)
            self._disk.add(found.shelf, found.name, record_bytes(found.place.length))
        if pages and self._shares:
            self.set_shares(self._shares, self._terms)

    def _stored(
        self, entry: Entry, page: memoryview, sealed: Sealed, *, again: bool = False
    ) -> None:
        """Take note of what was sealed and written of a page, wanted still or not.

        `again`: it was there before, and still is where this time it failed.
        """
        entry.page = None
        if not entry.readers:
            self._buffers.give_back(page)
        if sealed.place is not None:
            if entry.gone or not entry.on_disk:
                self._back.drop(entry.name, sealed.place)
            else:
                entry.place = sealed.place
        elif entry.on_disk and not (entry.gone or again) and self._disk is not None:
            self._disk.remove(entry.shelf, entry.name)
            entry.on_disk = False
        if entry.in_memory and not entry.gone:
            entry.frame = sealed.frame or entry.frame
        if not entry.gone and not entry.there:
            self._remove(entry)

    def _opened(self, reading: Reading, frame: memoryview | None, stale: bool) -> None:
        entry = reading.entry
        if entry.in_memory and entry.frame is None and not entry.gone:
            entry.frame = frame
        self._hits[reading.level] += 1
        reading.done(True)
        into = reading.into
        if into is not None and stale and self._may_seal_anew(entry, len(into)):
            entry.page = into
            self._renewed += 1
            stored = partial(self._stored, entry, into, again=True)
            self._back.seal(entry, reading.context, into, reading.layer_bytes, stored)
        elif into is not None:
            self._buffers.give_back(into)

    def _failed(self, reading: Reading, why: Failure) -> None:
        """Read a page where it lies now, or give it up: it is computed again."""
        entry = reading.entry
        if why is Failure.MOVED and not entry.gone and entry.place not in (None, reading.place):
            again = reading._replace(place=entry.place)
            self._back.open(again, None, self._opened, self._failed)
            return
        if reading.into is not None:
            self._buffers.give_back(reading.into)
        if not entry.gone and why is not Failure.AWAY:
            self._remove(entry)
        self._misses[reading.level] += 1
        reading.done(False)

    def _move(self, name: bytes, place: Place | None, seq: int) -> None:
        """Take note that a page lies elsewhere on the disk, or could not be read."""
        entry = self._entries.get(name)
        if entry is None or entry.place is None or entry.place.seq != seq:
            return
        entry.place = place
        if place is None:
            self._lose_all(self._disk, (name,))

    # The index

    def _find(self, context: SealContext) -> Entry | None:
        name = None if self.asleep else self._sealer.name_of(context)
        entry = None if name is None else self._entries.get(name)
        if entry is not None and 0 < entry.expires_s <= self._clock():
            return None
        return entry

    def _may_seal_anew(self, entry: Entry, size: int) -> bool:
        return entry.page is None and not entry.gone and self.has_room(entry, size)

    def _may(self, level: Level | None, shelf: bytes) -> bool:
        return level is not None and level.quota(shelf) > 0

    def _watch(self, entry: Entry) -> None:
        if entry.expires_s:
            heapq.heappush(self._expiring, (entry.expires_s, entry.name))

    def _admit(self, level: Level | None, entry: Entry, size: int) -> bool:
        """Make room for a page in a level at the cost of its shelf's oldest."""
        gone = None if level is None else level.admit(entry.shelf, entry.name, size)
        if level is None or gone is None:
            return False
        self._lose_all(level, gone)
        return True

    def _resize(self, level: Level | None, quotas: Mapping[bytes, int]) -> None:
        """Set a level's quotas; pages of accounts that are no more go, once all are known."""
        if level is None:
            return
        strangers = () if self._nameless else set(level.shelves()) - quotas.keys()
        self._lose_all(level, level.set_quotas({**dict.fromkeys(strangers, 0), **quotas}))

    def _lose_all(self, level: Level | None, names: Sequence[bytes]) -> None:
        """Take note that pages had to leave a level."""
        for name in names:
            entry = self._entries[name]
            if level is self._memory:
                entry.in_memory, entry.frame = False, None
            else:
                self._leave_disk(entry)
            if not entry.in_memory and not entry.on_disk:
                self._remove(entry)

    def _leave_disk(self, entry: Entry) -> None:
        place, entry.place, entry.on_disk = entry.place, None, False
        if place is not None:
            self._back.drop(entry.name, place)

    def _remove(self, entry: Entry, *, note: bool = True) -> None:
        """Take a page out; `note`: on the disk too."""
        for level in self._levels:
            level.remove(entry.shelf, entry.name)
        if note:
            self._leave_disk(entry)
        entry.gone, entry.page, entry.frame = True, None, None
        del self._entries[entry.name]
