"""Pages in the model's dtype, beside those a codec stores: the recent tokens of running views."""

from __future__ import annotations

import numpy as np

from kvkeep.cache.pool import TilePool
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Int32Array, PageKind, View


class Staging:
    """Keeps, per view, staged page slots from the first page a query may still see unencoded.

    Of a view that is not coded, its own slots are the staged ones.
    """

    def __init__(self, pool: TilePool) -> None:
        self._pool = pool
        self._staged: dict[int, dict[int, int]] = {}

    def pages_of(self, view: View, end: int, *, coded: bool) -> tuple[Int32Array, int]:
        """Return (slots, first page) that hold tokens before `end` in the model's dtype."""
        if not coded:
            return view.pages(), 0
        staged = self._staged.setdefault(view.id, {})
        first = min(staged, default=view.length // PAGE_TOKENS)
        last = (end - 1) // PAGE_TOKENS
        for page in range(view.length // PAGE_TOKENS, last + 1):
            if page not in staged:
                staged[page] = self._pool.alloc_page(PageKind.STAGED)
        return np.array([staged[page] for page in range(first, last + 1)], np.int32), first

    def drop_encoded(self, geometry: BatchGeometry) -> None:
        """Free staged pages that no later query sees."""
        for segment in geometry.segments:
            staged = self._staged.get(segment.view.id, {})
            gone = geometry.coded_pages(segment, segment.first_position + segment.num_rows)
            for page in [p for p in staged if p < gone]:
                self._pool.free_page(staged.pop(page))

    def fork(self, view: View, twin: View) -> None:
        """Give a fork the staged pages of its source: full ones shared, the open one copied."""
        own: dict[int, int] = {}
        for page, slot in self._staged.get(view.id, {}).items():
            if page < twin.length // PAGE_TOKENS:
                self._pool.hold_page(slot)
                own[page] = slot
            else:
                own[page] = self._pool.alloc_page(PageKind.STAGED)
                self._pool.copy_page(slot, own[page])
        self._staged[twin.id] = own

    def forget(self, view: View) -> None:
        """Let go of all staged pages of a view."""
        for slot in self._staged.pop(view.id, {}).values():
            self._pool.free_page(slot)
