"""Pages that are on their way down: with room in a tier, or waiting for their names' keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvkeep.cache.tier.entries import Entry
from kvkeep.cache.tiers import Copy, Read
from kvkeep.sealing import SealContext


class Taker(Protocol):
    """A tier as copies see it."""

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> Copy | None:
        """Make room for a page, see `Tier.store`."""

    def can_name(self, context: SealContext) -> bool:
        """Tell whether the keys of a page's names are at hand."""

    def has_room(self, entry: Entry, size: int) -> bool:
        """Tell whether a shelf may have so many bytes more on their way."""

    def take(
        self, entry: Entry, context: SealContext, layer_bytes: Sequence[int], read: Read
    ) -> None:
        """Copy a page."""

    def lose(self, entry: Entry | None, why: str | None = None) -> None:
        """Give up a page that was not copied; `why` is counted."""


class PageCopy:
    """A page that has room in a tier and is not copied yet."""

    def __init__(
        self,
        tier: Taker,
        entry: Entry,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
    ) -> None:
        self._tier = tier
        self._entry = entry
        self._context = context
        self._layer_bytes = layer_bytes
        self._read = read

    def take(self, *, last: bool) -> bool:
        """Copy the page, if the tier still has room for it; False where that must wait."""
        if self._entry.gone:
            return True
        if not self._tier.has_room(self._entry, sum(self._layer_bytes)):
            if last:
                self._tier.lose(self._entry, "queue")
            return last
        self._tier.take(self._entry, self._context, self._layer_bytes, self._read)
        return True

    def cancel(self) -> None:
        """Give the room back."""
        self._tier.lose(self._entry)


class LateCopy:
    """A page of an owner whose keys are being fetched: it gets its room once it has a name."""

    def __init__(
        self,
        tier: Taker,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> None:
        self._tier = tier
        self._context = context
        self._layer_bytes = layer_bytes
        self._read = read
        self._expires_s = expires_s
        self._named = False
        self._copy: Copy | None = None

    def take(self, *, last: bool) -> bool:
        """Copy the page, if it has a name by now; False where that must wait."""
        if not self._named:
            self._named = self._tier.can_name(self._context)
            if not self._named:
                if last:
                    self._tier.lose(None, "keys")
                return last
            self._copy = self._tier.store(
                self._context, self._layer_bytes, self._read, self._expires_s
            )
        return self._copy is None or self._copy.take(last=last)

    def cancel(self) -> None:
        """Give back what room it had."""
        if self._copy is not None:
            self._copy.cancel()
