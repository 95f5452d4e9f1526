"""Which live tokens of a view's first pages are left, and where they go when they are packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvkeep.eviction.corm import NEVER, pack, unpack
from kvkeep.types import PAGE_TOKENS, Int32Array, View
from kvkeep.watch import EvictState

WORTH = 0.75
"""Pages are packed the first time if at most so much of their tiles is needed."""

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Survivors:
    """The live tokens of what attention sees from its second page to before page `end`."""

    end: int
    """In pages of the sequence."""
    entries: int
    """In what attention sees."""
    order: Int64Array
    """[L, Hkv, n] tokens after the first page, the live ones first and in order."""
    counts: Int64Array
    """[L, Hkv] how many of them are live."""

    @property
    def need(self) -> Int32Array:
        """Return [L, Hkv] tiles that hold them."""
        return (-(-self.counts // PAGE_TOKENS)).astype(np.int32)


def survivors(view: View) -> Survivors | None:
    """Return what may be packed now; None where nothing may, or where it would not pay."""
    state = view.evict
    if state is None or state.watch.recent is None or not state.masks.size:
        return None
    end = max(0, view.length - state.watch.recent) // PAGE_TOKENS
    end -= end % 2
    if end <= (1 if view.packed is None else view.packed.end):
        return None
    entries = end - state.gap
    layers, _, heads, _ = state.last_hit.shape
    live = unpack(state.masks, (layers, entries, heads, PAGE_TOKENS))[:, 1:]
    flat = np.moveaxis(live, 2, 1).reshape(layers, heads, -1)
    counts = flat.sum(-1)
    pays = (-(-counts // PAGE_TOKENS)).sum() <= WORTH * (entries - 1) * layers * heads
    if view.packed is None and not pays:
        return None
    return Survivors(end, entries, np.argsort(~flat, axis=-1, kind="stable"), counts)


def repack(state: EvictState, found: Survivors, tiles: int) -> None:
    """Move masks and stamps as the tokens were moved, into `tiles` tiles of every head."""
    layers, _, heads, _ = state.last_hit.shape
    first, rest = state.last_hit[:, :1], state.last_hit[:, found.entries :]
    flat = np.moveaxis(state.last_hit[:, 1 : found.entries], 2, 1).reshape(layers, heads, -1)
    taken = np.take_along_axis(flat, found.order[..., : tiles * PAGE_TOKENS], -1)
    there = np.arange(tiles * PAGE_TOKENS) < found.counts[..., None]
    by_tile = (layers, heads, tiles, PAGE_TOKENS)
    stamps = np.where(there, taken, np.int32(NEVER)).reshape(by_tile)
    state.last_hit = np.concatenate([first, np.moveaxis(stamps, 1, 2), rest], axis=1)
    packed = pack(np.moveaxis(there.reshape(by_tile), 1, 2))
    state.masks = np.concatenate([state.masks[:1], packed, state.masks[found.entries :]])
    state.packed_end, state.gap = 1 + tiles, found.end - 1 - tiles
