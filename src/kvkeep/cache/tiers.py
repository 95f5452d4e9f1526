"""What lies below memory, as the manager sees it, and who hears of a page's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvkeep.cache.accounts import Retention
from kvkeep.sealing import KeyState, SealContext
from kvkeep.types import Int32Array, PageTag, View

Install = Callable[[int, bytes | memoryview], None]
"""Hears of layers of a page on their way up: the first one's number, and bytes of whole ones."""

Read = Callable[[memoryview], None]
"""Writes a page's layers one after another."""


class Copy(Protocol):
    """A page that a tier has made room for and not yet copied."""

    def take(self, *, last: bool) -> bool:
        """Copy the page; False where that must wait until other pages are written.

        `last`: it leaves memory now, and what cannot be copied is lost.
        """

    def cancel(self) -> None:
        """Give the room back: the page has gone."""


class Tier(Protocol):
    """A slower place for closed pages, named by what they are bound to.

    It never calls back from a thread of its own: callbacks run inside `poll`, or inside `fetch`
    itself. `layer_bytes` are the sizes of a page's layers.
    """

    def holds(self, context: SealContext) -> bool:
        """Tell at once whether a page could be fetched."""

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        """Start to fetch a page: `install(layer, data)` for all layers, then `done(ok)`.

        Both may be called after the reader lost interest, and do nothing then.
        """

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> Copy | None:
        """Make room for a page that nothing uses any more, at the cost of its owner's oldest.

        `read` is valid until the copy was taken or cancelled. None: there is nothing to
        copy. `expires_s`: Unix time from which it is not to be found.
        """

    def forget(self, owner: str) -> int:
        """Drop every page of an owner; return how many."""

    def poll(self) -> None:
        """Run the callbacks that are due, on the caller's thread."""


class FirstOf:
    """Two tiers as one: the second is asked for what the first lacks, and given nothing."""

    def __init__(self, first: Tier, second: Tier) -> None:
        self._first = first
        self._second = second

    def holds(self, context: SealContext) -> bool:
        """Tell whether either could give a page."""
        return self._first.holds(context) or self._second.holds(context)

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        """Ask the first, and the second for what that lacks or can't read; see `Tier.fetch`."""

        def ended(ok: bool) -> None:
            if ok or not self._second.holds(context):
                done(ok)
            else:
                self._second.fetch(context, layer_bytes, install, done)

        if self._first.holds(context):
            self._first.fetch(context, layer_bytes, install, ended)
        else:
            self._second.fetch(context, layer_bytes, install, done)

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> Copy | None:
        """Have the first make room for a page."""
        return self._first.store(context, layer_bytes, read, expires_s)

    def forget(self, owner: str) -> int:
        """Drop every page of an owner in both."""
        return self._first.forget(owner) + self._second.forget(owner)

    def poll(self) -> None:
        """Run what is due in both."""
        self._first.poll()
        self._second.poll()


@dataclass(frozen=True, slots=True)
class Room:
    """What the file system of a disk tier has left."""

    free_bytes: int
    read_only: bool


class Surroundings(NamedTuple):
    """What a tier depends on, at one moment."""

    room: Room | None = None
    keys: KeyState | None = None


@dataclass(frozen=True, slots=True)
class TierUse:
    """A tier at one moment, and what it did so far."""

    tier: str
    limit_bytes: int
    used_bytes: int = 0
    pages: int = 0
    hits: int = 0
    misses: int = 0
    """Pages that were found and could not be read or opened."""
    drops: tuple[tuple[str, int], ...] = ()
    """(why, pages) that were not taken."""
    errors: tuple[tuple[str, int], ...] = ()
    """(kind, count)."""
    renewed: int = 0
    """Pages of former key epochs that were sealed anew when they were read."""
    room: Room | None = None
    """Of the disk it is on."""
    keys: KeyState | None = None
    """None: pages are not sealed."""


class TierControl(Protocol):
    """A tier's surroundings, as an engine drives them."""

    asleep: bool
    """Nothing is taken or found while it is set."""

    def set_shares(self, shares: Mapping[str, float], terms: Mapping[str, Retention]) -> None:
        """Set each account's part of every tier, and how far down its pages may go."""

    def end_epoch(self, now: float) -> None:
        """Take note of an epoch's end at `now` (Unix seconds)."""

    def due(self) -> bool:
        """Tell whether `poll` has something to do."""

    def uses(self) -> tuple[TierUse, ...]:
        """Return the figures of every tier."""

    def close(self, wait_s: float) -> None:
        """Write what was taken, for so long at most, and end."""


class NoTiers:
    """Nothing below memory."""

    asleep = False

    def set_shares(self, shares: Mapping[str, float], terms: Mapping[str, Retention]) -> None:
        """Nobody has a part."""

    def end_epoch(self, now: float) -> None:
        """Nothing to do."""

    def due(self) -> bool:
        """Return False."""
        return False

    def uses(self) -> tuple[TierUse, ...]:
        """Return nothing."""
        return ()

    def close(self, wait_s: float) -> None:
        """Nothing to write."""


@dataclass(frozen=True, slots=True)
class ClosedPage:
    """A page of a view whose last row a step has computed."""

    request_id: str
    view: View
    index: int
    """Its place in the view."""
    slot: int
    """Where it lies until the view is changed: read it now or not at all."""


class OpenRows(NamedTuple):
    """Rows of a prompt behind its last whole pages or blocks, which a step has completed."""

    request_id: str
    tag: PageTag
    """Of the view they are stored in."""
    num_rows: int
    slots: Int32Array
    """Of their pages, in the model's dtype."""


class PageListener(Protocol):
    """Hears of a prompt's layers as a forward pass completes them."""

    def layer_closed(self, page: ClosedPage, layer: int) -> None:
        """All S rows of the page are stored in this layer, in the codec's form."""

    def rows_stored(self, rows: OpenRows, layer: int, data: bytes) -> None:
        """Those rows are stored in this layer, in the model's dtype: [2, T, Hkv, D], K and V.

        Of prompts alone that another engine answers.
        """
