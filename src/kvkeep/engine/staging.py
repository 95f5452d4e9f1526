"""Pages in the model's dtype that a codec has yet to encode."""

from __future__ import annotations

import numpy as np

from kvkeep.cache.pool import TilePool
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Int32Array, View


class Staging:
    """Keeps, per view, staged page slots from the first page a query may still see unencoded.

    Where nothing is encoded (`window_tokens` None) a view's own slots are the staged ones.
    """

    def __init__(self, pool: TilePool, window_tokens: int | None) -> None:
        self._pool = pool
        self._window = window_tokens
        self._staged: dict[int, dict[int, int]] = {}

    def pages_of(self, view: View, end: int) -> tuple[Int32Array, int]:
        """Return (slots, first page) that hold tokens before `end` in the model's dtype."""
        if self._window is None:
            return view.slots, 0
        staged = self._staged.setdefault(view.id, {})
        first = min(staged, default=view.length // PAGE_TOKENS)
        for page in range(view.length // PAGE_TOKENS, (end - 1) // PAGE_TOKENS + 1):
            if page not in staged:
                staged[page] = self._take(view, page)
        last = max(staged, default=first - 1)
        slots = [staged.get(page, int(view.slots[page])) for page in range(first, last + 1)]
        return np.array(slots, np.int32), first

    def drop_encoded(self, geometry: BatchGeometry) -> None:
        """Free staged pages that no later query sees."""
        for segment in geometry.segments:
            staged = self._staged.get(segment.view.id, {})
            gone = geometry.coded_pages(segment.first_position + segment.num_rows)
            for page in [p for p in staged if p < gone]:
                self._pool.free_page(staged.pop(page))

    def forget(self, view: View) -> None:
        """Free all staged pages of a view."""
        for slot in self._staged.pop(view.id, {}).values():
            self._pool.free_page(slot)

    def _take(self, view: View, page: int) -> int:
        """Allocate a staged page; rows the view starts with come along."""
        slot = self._pool.alloc_page()
        if page * PAGE_TOKENS < view.length:
            self._pool.copy_page(int(view.slots[page]), slot)
        return slot
