"""How pages come up, on the reading threads: frames are read, several at a time, and opened."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

from kvkeep.cache.tier.buffers import Buffers
from kvkeep.cache.tier.entries import Entry
from kvkeep.cache.tier.frames import Away, Frames, Moved, Place
from kvkeep.cache.tier.records import record_bytes
from kvkeep.cache.tiers import Install
from kvkeep.errors import KeysUnavailable
from kvkeep.sealing import SealContext, TierSealer


class Reading(NamedTuple):
    """One page on its way up, and who hears of it."""

    entry: Entry
    context: SealContext
    layer_bytes: Sequence[int]
    install: Install
    done: Callable[[bool], None]
    level: str
    place: Place | None = None
    """Where it lies in the level, where that is not memory."""
    keeps: bool = True
    """Whether the frame is wanted once it was opened."""
    into: memoryview | None = None
    """Where its layers are opened into, once a thread begins with it, until it was heard of."""


Heard = Callable[[Reading, memoryview | None, bool], None]
"""Hears of an opened page: its frame if it was to be kept, and whether to seal it anew."""


class Failure(Enum):
    """Why a page could not be had."""

    MOVED = auto()
    """It lies elsewhere by now."""
    AWAY = auto()
    """Nobody gives it or its keys out at the moment."""
    BROKEN = auto()


class Opening(NamedTuple):
    """A page to be opened, read first where no frame is given; `failed` hears why."""

    reading: Reading
    frame: memoryview | None
    opened: Heard
    failed: Callable[[Reading, Failure], None]
    spare: memoryview | None = None
    """What the frame was read into, where it is not wanted any longer than that."""


class Opener:
    """Reads frames and opens them; called on any thread."""

    def __init__(
        self,
        sealer: TierSealer,
        frames: Mapping[str, Frames],
        buffers: Buffers,
        post: Callable[[int, Callable[[], None]], None],
        note: Callable[[Exception, str], None],
    ) -> None:
        """Pages are opened into memory of `buffers`; `post` takes events and their bytes."""
        self._sealer = sealer
        self._frames = frames
        self._buffers = buffers
        self._spare = Buffers()
        self._turns = {level: threading.Lock() for level in frames}
        self._post = post
        self._note = note

    def open_all(self, openings: Sequence[Opening]) -> None:
        """Read some pages, then open them, their keys asked for together; raises nothing.

        One thread reads of a level at a time, so that it is read forwards, while others open.
        """
        read: list[tuple[Opening, memoryview]] = []
        for level, some in itertools.groupby(openings, lambda one: one.reading.level):
            with self._turns.get(level, nullcontext()):
                read += filter(None, map(self._read, some))
        with self._sealer.expecting([(one.reading.context, frame) for one, frame in read]):
            for one, frame in read:
                self._open(one, frame)

    def _read(self, one: Opening) -> tuple[Opening, memoryview] | None:
        """Return a page's frame; None where there is none, and its reader will hear."""
        reading = one.reading
        if one.frame is not None:
            return one, one.frame
        place = reading.place
        if place is None:
            self._fail(one, Moved())
            return None
        if not reading.keeps:
            one = one._replace(spare=self._spare.take(record_bytes(place.length)))
        try:
            frame = self._frames[reading.level].read(reading.entry.name, place, one.spare)
        except Exception as error:  # noqa: BLE001 - a page is a miss, whatever it was
            self._fail(one, error)
            return None
        return one, frame

    def _open(self, one: Opening, frame: memoryview) -> None:
        reading = one.reading
        if reading.into is None:
            reading = reading._replace(into=self._buffers.take(sum(reading.layer_bytes)))
        try:
            stale = self._hand_out(reading, frame)
        except Exception as error:  # noqa: BLE001 - a page is a miss, whatever it was
            self._fail(one._replace(reading=reading), error)
            return
        kept = frame if one.spare is None else None
        self._post(0, partial(one.opened, reading, kept, stale))
        self._give_back(one)

    def _hand_out(self, reading: Reading, frame: memoryview) -> bool:
        """Give out a page's layers as they open; tell whether it should be sealed anew."""
        sizes = reading.layer_bytes
        opening = self._sealer.open(reading.context, frame, sizes, reading.into)
        layer = 0
        while True:
            try:
                data = next(opening)
            except StopIteration as end:
                return bool(end.value)
            self._post(len(data), partial(reading.install, layer, data))
            left = len(data)
            while left > 0:
                left -= sizes[layer]
                layer += 1

    def _fail(self, one: Opening, error: Exception) -> None:
        """Tell a page's reader why it can't be had."""
        why = Failure.MOVED
        if not isinstance(error, Moved):
            self._note(error, "read")
            away = isinstance(error, (KeysUnavailable, Away))
            why = Failure.AWAY if away else Failure.BROKEN
        self._post(0, partial(one.failed, one.reading, why))
        self._give_back(one)

    def _give_back(self, one: Opening) -> None:
        if one.spare is not None:
            self._spare.give_back(one.spare)
