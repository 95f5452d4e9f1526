"""Which live tokens of a view's first pages are left, and where they go when they are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvkeep.eviction.corm import NEVER, pack, unpack
from kvkeep.types import PAGE_TOKENS, Int32Array, View
from kvkeep.watch import EvictState

WORTH: Final = 0.75
"""Pages are packed the first time if at most so much of their tiles is needed, and a head's coded
tiles put together anew if so much of them is.
"""

WORTH_PLAIN: Final = 0.9
"""The same of tiles in the model's dtype, which lose nothing by it."""

WRITTEN: Final = -1
"""Of a tile: its tokens are put together."""
ABSENT: Final = -2
"""Of a tile: a head has fewer."""

Int64Array = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where the live tokens of a view's second page to before page `end` go."""

    end: int
    """In pages of the sequence."""
    entries: int
    """In what attention sees."""
    source: Int64Array
    """[L, Hkv, n, S] the token, counted after the first page, at each place; -1: none."""
    stays: Int32Array
    """[n, L, Hkv] which of the view's own tiles it is, untouched; or `WRITTEN`, or `ABSENT`."""
    fresh: bool
    """Whether nothing of the view was packed before."""

    def cuts(self, parts: int) -> list[tuple[int, Bools]]:
        """Return from which page on, and which tiles [n, L, Hkv], are moved one after the other.

        From the end on, `parts` times, where everything is moved for the first time.
        """
        if not self.fresh:
            return [(1, self.need)]
        page = np.moveaxis(self.source.max(-1) // PAGE_TOKENS, -1, 0) + 1
        step = max(2, (self.end - 1) // parts)
        found, last = [], self.end
        for begin in (*range(self.end - step, 1, -step), 1):
            found.append((begin, self.need & (begin <= page) & (page < last)))
            last = begin
        return found

    @property
    def need(self) -> Bools:
        """Return [n, L, Hkv] where there is a tile."""
        found: Bools = self.stays != ABSENT
        return found


def arrangement(view: View, window_tokens: int | None) -> Arrangement | None:
    """Return how a view may be packed now; None where nothing may, or where it would not pay.

    Of coded pages, in blocks of `window_tokens`, those whose block has ended. Tokens stand densely,
    in order; a later packing only appends, as long as that takes hardly more.
    """
    state = view.evict
    if state is None or state.watch.recent is None or not state.masks.size:
        return None
    end = max(0, view.length - state.watch.recent) // PAGE_TOKENS
    if window_tokens is not None:
        end = min(end, view.length // window_tokens * (window_tokens // PAGE_TOKENS))
    end -= end % 2
    if end <= (1 if view.packed is None else view.packed.end):
        return None
    entries = end - state.gap
    layers, _, heads, _ = state.last_hit.shape
    live = unpack(state.masks, (layers, entries, heads, PAGE_TOKENS))[:, 1:].swapaxes(1, 2)
    own = 0 if view.packed is None else len(view.packed.tiles)
    need = -(-live.sum((2, 3)) // PAGE_TOKENS)
    if not own and need.sum() > WORTH * live[..., 0].size:
        return None
    worth = WORTH_PLAIN if window_tokens is None else WORTH
    by_head = [_arranged(live[at], own, worth) for at in np.ndindex(layers, heads)]
    most = max(len(tiles) for tiles in by_head)
    source = np.full((layers * heads, most, PAGE_TOKENS), -1, np.int64)
    for at, tiles in enumerate(by_head):
        source[at, : len(tiles)] = tiles
    stays = _staying(source, own).reshape(layers, heads, most)
    source = source.reshape(layers, heads, most, PAGE_TOKENS)
    stays = np.ascontiguousarray(np.moveaxis(stays, -1, 0))
    return Arrangement(end, entries, source, stays, view.packed is None)


def _arranged(live: Bools, own: int, worth: float) -> Int64Array:
    """Return the tokens [n, S] of one head's tiles, for live ones [tiles, S] of old ones.

    The first `own` are better left as they are, if more than so much of them is needed.
    """
    index = np.arange(live.size).reshape(live.shape)
    dense = _dense(index[live])
    there = np.flatnonzero(live[:own].any(-1))
    opened = there[-1:] if len(there) and not live[there[-1]].all() else there[:0]
    left = there[: len(there) - len(opened)]
    moved = np.concatenate([opened, np.arange(own, len(live))])
    loose = _dense(index[moved][live[moved]])
    left = np.where(live[left], index[left], -1)
    apart = np.concatenate([left, loose])
    return dense if not own or len(dense) <= worth * len(apart) else apart


def _dense(tokens: Int64Array) -> Int64Array:
    """Return tokens as tiles [n, S], -1 behind the last."""
    tiles = np.full((-(-len(tokens) // PAGE_TOKENS), PAGE_TOKENS), -1, np.int64)
    tiles.ravel()[: len(tokens)] = tokens
    return tiles


def _staying(source: Int64Array, own: int) -> Int32Array:
    """Return [N, n] which tiles are what one of the first `own` was, perhaps with fewer tokens."""
    there = source >= 0
    tile = source.max(-1) // PAGE_TOKENS
    same = tile[..., None] * PAGE_TOKENS + np.arange(PAGE_TOKENS) == source
    stays = (same | ~there).all(-1) & (tile < own)
    found = np.where(stays, tile, WRITTEN)
    return np.where(there.any(-1), found, ABSENT).astype(np.int32)


def repack(state: EvictState, found: Arrangement) -> None:
    """Move masks and stamps as the tokens were moved."""
    layers, heads, tiles, _ = found.source.shape
    first, rest = state.last_hit[:, :1], state.last_hit[:, found.entries :]
    flat = np.moveaxis(state.last_hit[:, 1 : found.entries], 2, 1).reshape(layers, heads, -1)
    there = found.source >= 0
    taken = np.take_along_axis(flat, np.maximum(found.source, 0).reshape(layers, heads, -1), -1)
    stamps = np.where(there, taken.reshape(there.shape), np.int32(NEVER))
    state.last_hit = np.concatenate([first, np.moveaxis(stamps, 1, 2), rest], axis=1)
    packed = pack(np.moveaxis(there, 1, 2))
    state.masks = np.concatenate([state.masks[:1], packed, state.masks[found.entries :]])
    state.packed_end, state.gap = 1 + tiles, found.end - 1 - tiles
