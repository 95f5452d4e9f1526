"""Prefixes that the operator has declared public."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Pins:
    """Chain hashes of pinned pages; every tenant may read them from the moment they are here."""

    def __init__(self) -> None:
        self._pages: set[bytes] = set()

    def add(self, chain: Iterable[bytes]) -> None:
        """Pin the pages of one prefix."""
        self._pages.update(chain)

    def leading(self, chain: Sequence[bytes]) -> int:
        """Return how many leading pages of a chain are pinned."""
        if not self._pages:
            return 0
        return next((i for i, page in enumerate(chain) if page not in self._pages), len(chain))
