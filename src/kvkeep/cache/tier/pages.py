"""Pages below memory: sealed frames in host memory, on a disk and in a service, one index over all.

The index, the quotas and the order in which pages go are changed by the engine's thread alone,
and depend on what an owner did alone. Sealing, writing, reading and opening happen on other
threads; what they found is taken in by `poll`, a bounded number of bytes at a time.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from kvkeep.cache.accounts import Retention
from kvkeep.cache.pace import Pace
from kvkeep.cache.tier.backroom import Backroom, Sealed
from kvkeep.cache.tier.buffers import Buffers
from kvkeep.cache.tier.copies import LateCopy, PageCopy
from kvkeep.cache.tier.entries import MEMORY, Entry, Index
from kvkeep.cache.tier.files import Files
from kvkeep.cache.tier.frames import Found, Frames, Place
from kvkeep.cache.tier.levels import Level
from kvkeep.cache.tier.lowest import TierSizes, lower_of
from kvkeep.cache.tier.opening import Failure, Opening, Reading
from kvkeep.cache.tiers import Copy, Install, Read, Surroundings, TierUse
from kvkeep.errors import SealError
from kvkeep.sealing import SealContext, TierSealer

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
        sealer: TierSealer,
        sizes: TierSizes,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
        ended: Callable[[], None] = lambda: None,
        look: Callable[[], Surroundings] = Surroundings,
        remote: Frames | None = None,
        wipes: bool = False,
    ) -> None:
        """`files`: of the disk tier, `remote`: both read at once; raises `OSError` if that fails.

        `ended` is called once nothing is sealed or opened any more; `look` tells what it is on;
        `wipes`: copies in the clear are zeroed once they were used.
        """
        self.asleep = False
        """Nothing is taken or found while it is set."""
        self._sealer = sealer
        self._clock = clock
        self._ended = ended
        self._look = look
        lower = lower_of(sizes, files, remote)
        levels = [Level(MEMORY, sizes.memory_bytes)] if sizes.memory_bytes else []
        levels += [one.level for one in lower]
        self._index = Index(levels, self._drop)
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._buffers = Buffers(wipe=wipes)
        self._pace = Pace(POLL_BYTES, MOST_BYTES)
        self._shares: dict[str, float] = {}
        self._terms: dict[str, Retention] = {}
        self._nameless = False
        """Whether some account's shelf could not be named when quotas were set."""
        self._queue_bytes: dict[bytes, int] = {}
        self._renewed = 0
        makes = {one.level.name: one.make for one in lower}
        self._back = Backroom(sealer, makes, self._move, self._take_back, clock, self._buffers)

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
        self._index.touch(entry)
        nearest = self._index.levels[0].name
        reading = Reading(entry, context, layer_bytes, install, done, nearest)
        if entry.page is not None:
            self._back.hand_over(reading, entry.page, self._opened)
            return
        if entry.frame is None:
            reading = self._found(reading)
        self._open(reading, entry.frame)

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
        index = self._index
        known, lower = index.entries.get(name), index.lower
        if known is not None and (
            any(level.name in known.on for level in lower)
            or not any(level.quota(shelf) > 0 for level in lower)
        ):
            index.expire(known, expires_s or 0.0)
            index.touch(known)
            return None
        if known is not None:
            index.remove(known)
        page_bytes = sum(layer_bytes)
        self._back.prepare(page_bytes, self._buffers.lacks(page_bytes), self._buffers.give_back)
        entry = Entry(name, shelf, expires_s or 0.0)
        frame_bytes = self._sealer.frame_bytes(layer_bytes)
        for level in index.levels:
            index.admit(level, entry, frame_bytes)
        if not entry.on:
            self._drops["quota"] += 1
            return None
        index.add(entry)
        return PageCopy(self, entry, context, layer_bytes, read)

    def forget(self, owner: str) -> int:
        """Drop every page of an owner; return how many."""
        shelf = None if self.asleep else self._sealer.shelf_of(owner)
        if shelf is None:
            return 0
        pages = self._index.forget(shelf)
        self._back.purge(shelf)
        return pages

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
        own = {
            shelf: (shares[name], terms.get(name, Retention()))
            for name, shelf in shelves.items()
            if shelf is not None
        }
        self._queue_bytes |= {shelf: int(share * QUEUE_BYTES) for shelf, (share, _) in own.items()}
        self._index.set_quotas(own, strangers_stay=self._nameless)

    def end_epoch(self, now: float) -> None:
        """Give up pages whose time is over; name the accounts whose keys were not there before."""
        if self._nameless:
            self.set_shares(self._shares, self._terms)
        self._index.expired(now)

    def due(self) -> bool:
        """Tell whether `poll` has something to do."""
        return self._back.due()

    def uses(self) -> tuple[TierUse, ...]:
        """Return the figures of every tier; what concerns all stands with the last."""
        found = []
        around = self._look()
        for level in self._index.levels:
            last = level is self._index.levels[-1]
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
                    around.room if level.name == "disk" else None,
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
        try:
            read(page)
        except SealError:
            self._buffers.give_back(page)
            self.lose(entry, "changed")
            return
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
            self._index.remove(entry)

    # What the threads found

    def _take_back(self, level: str, pages: list[Found]) -> None:
        """Index what outlived a restart, within the quotas that are set by now."""
        index = self._index
        own = next(one for one in index.levels if one.name == level)
        for found in pages:
            entry = index.entries.get(found.name)
            if entry is None:
                entry = Entry(found.name, found.shelf, found.expires_s)
                index.add(entry)
            if level not in entry.on:
                index.take_back(own, entry, found.place)
        if pages and self._shares:
            self.set_shares(self._shares, self._terms)

    def _stored(self, entry: Entry, page: memoryview, sealed: Sealed) -> None:
        """Take note of what was sealed and written of a page, wanted still or not."""
        entry.page = None
        if not entry.readers:
            self._buffers.give_back(page)
        self._written(entry, tuple(level.name for level in self._index.lower), sealed)
        if entry.gone:
            return
        if MEMORY in entry.on:
            entry.frame = sealed.frame or entry.frame
        if not entry.there:
            self._index.remove(entry)

    def _written(self, entry: Entry, levels: Sequence[str], sealed: Sealed) -> None:
        """Take note of where a page lies now; it leaves those levels where it does not."""
        for level, place in sealed.places.items():
            if entry.gone or level not in entry.on:
                self._back.drop(level, entry.name, place)
            else:
                entry.places[level] = place
        for level in levels:
            if not entry.gone and level in entry.on and level not in entry.places:
                self._index.leave(level, entry)

    def _opened(self, reading: Reading, frame: memoryview | None, stale: bool) -> None:
        entry = reading.entry
        if MEMORY in entry.on and entry.frame is None and not entry.gone:
            entry.frame = frame
        self._hits[reading.level] += 1
        reading.done(True)
        into = reading.into
        if into is not None and stale and self._may_seal_anew(entry, len(into)):
            entry.page = into
            self._renewed += 1
            stored = partial(self._stored, entry, into)
            self._back.seal(entry, reading.context, into, reading.layer_bytes, stored)
            return
        if into is not None:
            self._buffers.give_back(into)
        self._rise(reading, frame)

    def _found(self, reading: Reading) -> Reading:
        """Find a page in the nearest level that has it; memory has room for it before it comes."""
        levels, entry = self._index.levels, reading.entry
        name = next(level.name for level in levels if level.name in entry.places)
        place = entry.places[name]
        if levels[0].name == MEMORY not in entry.on:
            self._index.admit(levels[0], entry, place.length)
        return reading._replace(level=name, place=place)

    def _rise(self, reading: Reading, frame: memoryview | None) -> None:
        """Write a page that was read to the levels before the one that gave it, as it is.

        They make room for it only now: a level that gives nothing costs the others nothing.
        """
        entry = reading.entry
        if frame is None or entry.gone or not self.has_room(entry, len(frame)):
            return
        before = itertools.takewhile(lambda one: one.name != reading.level, self._index.lower)
        wanted = [one for one in before if one.name not in entry.on]
        risen = [one.name for one in wanted if self._index.admit(one, entry, len(frame))]
        if risen:
            self._back.copy(entry, frame, risen, partial(self._written, entry, risen))

    def _failed(self, reading: Reading, why: Failure) -> None:
        """Read a page where it lies now, or farther down, or give it up: it is computed again."""
        entry, level = reading.entry, reading.level
        place = entry.places.get(level)
        if why is Failure.MOVED and place not in (None, reading.place):
            self._open(reading._replace(place=place), None)
            return
        self._misses[level] += 1
        if not entry.gone and why is not Failure.AWAY:
            self._index.leave(level, entry)
            lower = [one.name for one in self._index.lower if one.name in entry.places]
            if lower:
                self._open(reading._replace(level=lower[0], place=entry.places[lower[0]]), None)
                return
        if not entry.gone and not entry.there:
            self._index.remove(entry)
        if reading.into is not None:
            self._buffers.give_back(reading.into)
        reading.done(False)

    def _open(self, reading: Reading, frame: memoryview | None) -> None:
        """Have a page opened; its frame is kept where memory or a nearer level takes it."""
        nearest = next((level.name for level in self._index.lower), None)
        keeps = MEMORY in reading.entry.on or reading.level != nearest
        reading = reading._replace(keeps=keeps)
        self._back.open(Opening(reading, frame, self._opened, self._failed))

    def _move(self, level: str, name: bytes, place: Place | None, seq: int) -> None:
        """Take note that a page lies elsewhere in a level, or could not be read."""
        entry = self._index.entries.get(name)
        before = None if entry is None else entry.places.get(level)
        if entry is None or before is None or before.seq != seq:
            return
        if place is None:
            del entry.places[level]
            self._index.leave(level, entry)
        else:
            entry.places[level] = place

    # The index

    def _drop(self, level: str, name: bytes, place: Place) -> None:
        self._back.drop(level, name, place)

    def _find(self, context: SealContext) -> Entry | None:
        name = None if self.asleep else self._sealer.name_of(context)
        entry = None if name is None else self._index.entries.get(name)
        if entry is not None and 0 < entry.expires_s <= self._clock():
            return None
        return entry

    def _may_seal_anew(self, entry: Entry, size: int) -> bool:
        return entry.page is None and not entry.gone and self.has_room(entry, size)
