"""Pages whose bytes in memory were changed by somebody else: they leave the index."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from kvkeep.cache.store import PageStore


class Losses:
    """Drops pages of one cache that can't be used any more."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self.lost_pages = 0

    def lose(self, tiles: Collection[int]) -> None:
        """Drop every indexed page that one of these tiles is of, and what continues it.

        Views that hold them keep them until they let go; nobody else finds them.
        """
        store = self._store
        changed, table = np.fromiter(tiles, np.int32), store.pool.tile_table
        for root in store.index.roots():
            for page in store.index.leaves_first(root)[::-1]:
                if page.attached and np.isin(table[page.slot], changed).any():
                    self.lost_pages += store.drop_below(page) + 1
                    store.drop(page)
