"""Pages that stay where they are while somebody reads them."""

from __future__ import annotations

from kvkeep.cache.matching import Match
from kvkeep.cache.store import PageStore


class Holds:
    """Makes holds on a cache's pages."""

    def __init__(self, store: PageStore) -> None:
        self._store = store

    def take(self, match: Match) -> Hold:
        """Hold what a match found."""
        return Hold(self._store, match)

    def pages(self, account: str) -> int:
        """Return how many pages of an account holds, views and fetches keep where they are."""
        return self._store.share(account).referenced_pages


class Hold:
    """The pages of one match; neither evicted nor freed until `end`."""

    def __init__(self, store: PageStore, match: Match) -> None:
        self._store = store
        self._pages = match.attached()
        for page in self._pages:
            store.lock(page)

    @property
    def slots(self) -> list[int]:
        """Return where the pages lie, the first of the prompt first."""
        return [page.slot for page in self._pages]

    def end(self) -> None:
        """Let go of all pages, deepest first."""
        for page in reversed(self._pages):
            self._store.unlock(page)
        self._pages = []
