"""What lies below memory, as the manager sees it, and who hears of a page's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Tier(Protocol):
    """A slower place for closed pages, found by chain hash.

    It never calls back from a thread of its own: callbacks run inside `poll`, or inside `fetch`
    itself.
    """

    def holds(self, chain_hash: bytes) -> bool:
        """Tell at once whether a page could be fetched."""

    def fetch(
        self,
        chain_hash: bytes,
        install: Callable[[int, bytes], None],
        done: Callable[[bool], None],
    ) -> None:
        """Start to fetch a page: `install(layer, data)` per layer, in any order, then `done(ok)`.

        Both may be called after the reader lost interest, and do nothing then.
        """

    def store(self, chain_hash: bytes, read: Callable[[int], bytes]) -> None:
        """Take over a page that leaves memory; `read(layer)` is valid until this returns."""

    def poll(self) -> None:
        """Run the callbacks that are due, on the caller's thread."""


class PageListener(Protocol):
    """Hears of a page's layers as a forward pass completes them."""

    def layer_closed(self, page: int, layer: int) -> None:
        """All S rows of the page in this slot are stored in this layer."""
