"""What a step's rows see, request by request: the input of every planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvkeep.ops.layout import STEP_TOKENS
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Int32Array, Segment, UInt64Array
from kvkeep.watch import Packed

STEP_PAGES = STEP_TOKENS // PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Chain:
    """Consecutive rows of one request that see the same pages."""

    view: int
    """Id of the request's view."""
    version: int
    """Of the view's pages: equal for as long as they only grow."""
    first_row: int
    num_rows: int
    first_position: int
    pages: Int32Array
    """Slots of the pages the rows see, the last perhaps in part."""
    coded: int
    """Leading pages in the codec's layout."""
    shareable: int
    """Leading pages that all of the rows see whole, as every other request that holds them does."""
    scope: str
    masks: UInt64Array | None
    """[n, L, Hkv] live masks of the leading n pages."""
    packed: Packed | None = None
    """Tiles of the view's own in place of leading pages; its entries -1 - i name them."""
    apart: int = 0
    """Leading pages that lie elsewhere, and are not among `pages`."""

    def page_at(self, entry: int) -> int:
        """Return the place in the sequence of an entry of `pages`."""
        if self.apart:
            return entry + self.apart
        if self.packed is None or entry <= len(self.packed.tiles):
            return entry
        return entry + self.packed.gap


def chains_of(geometry: BatchGeometry) -> list[Chain]:
    """Return the step's rows as chains, in the order of rows."""
    return [
        _chain(segment, geometry, begin, end, coded)
        for segment in geometry.segments
        for begin, end, coded in _row_groups(segment, geometry)
    ]


def _chain(segment: Segment, geometry: BatchGeometry, begin: int, end: int, coded: int) -> Chain:
    view, first = segment.view, segment.first_position + begin
    pages = _pages(segment, coded, (segment.first_position + end - 1) // PAGE_TOKENS + 1)
    evict, packed = view.evict, view.packed
    if packed is not None:
        own = -1 - np.arange(len(packed.tiles), dtype=np.int32)
        pages = np.concatenate([pages[:1], own, pages[packed.end :]])
        coded = coded and coded - packed.gap
    if view.apart:
        pages, coded = pages[view.apart :], max(coded - view.apart, 0)
    masks = evict.masks[: len(pages)] if evict is not None and evict.masks.size else None
    shareable = 0
    if view.apart:
        shareable = 0
    elif evict is None or (not evict.masks.size and first + end - begin <= evict.watch.first):
        shareable = first // STEP_TOKENS * STEP_PAGES
        if geometry.window_of(segment) is not None:
            shareable = min(shareable, coded)
    return Chain(
        view.id,
        view.version,
        segment.first_row + begin,
        end - begin,
        first,
        pages,
        coded,
        shareable - shareable % STEP_PAGES,
        view.tag.scope,
        masks,
        packed,
        view.apart,
    )


def _row_groups(segment: Segment, geometry: BatchGeometry) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, end row, encoded pages), cut where the encoded pages change."""
    first, begin, block = segment.first_position, 0, geometry.window_of(segment)
    if block is not None:
        for edge in range((first // block + 1) * block, first + segment.num_rows, block):
            yield begin, edge - first, geometry.coded_pages(segment, first + begin)
            begin = edge - first
    yield begin, segment.num_rows, geometry.coded_pages(segment, first + begin)


def _pages(segment: Segment, coded: int, count: int) -> Int32Array:
    """Return `count` page slots: the first `coded` encoded, the others in the model's dtype."""
    if segment.staged_from >= count or coded == count:
        return segment.view.slots[:count]
    head = segment.view.slots[: max(coded, segment.staged_from)]
    return np.concatenate([head, segment.staged[len(head) - segment.staged_from :]])[:count]
