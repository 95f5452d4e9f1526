"""What of a view is observed, evicted and packed; numpy only, like `types`, and below it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Spans = tuple[tuple[int, int], ...]
"""Ranges [begin, end) of positions."""


@dataclass(frozen=True, slots=True)
class Watch:
    """When a view's rows are observed and its tokens evicted: known from its prompt alone."""

    prompt_tokens: int
    first: int
    """The first position whose row may be observed; rows from there on are always computed."""
    every: int = 1
    """After the prompt, tokens are evicted where so many divide the tokens seen."""
    recent: int | None = None
    """Latest tokens that stay in any case; pages wholly before them may be packed. None: never."""

    def edge(self, begin: int) -> int:
        """Return where rows that begin at `begin` must end at the latest.

        All of them see the same masks then, however many are computed at a time.
        """
        if begin < self.prompt_tokens:
            return self.prompt_tokens
        return (begin // self.every + 1) * self.every

    def decides(self, position: int) -> bool:
        """Tell whether tokens may be evicted once the row at `position` is computed."""
        seen = position + 1
        return seen == self.prompt_tokens or (seen > self.prompt_tokens and not seen % self.every)


@dataclass(frozen=True, slots=True)
class Packed:
    """What is left of a view's pages 1 to `end` - 1, in tiles of its own."""

    tiles: NDArray[np.int32]
    """[n, L, Hkv] tile ids; -1 beyond a head's last."""
    end: int
    """An even page: from there on the view's pages are whole."""

    @property
    def gap(self) -> int:
        """Return by how many pages the view has become shorter."""
        return self.end - 1 - len(self.tiles)


@dataclass(slots=True)
class EvictState:
    """What a token evictor remembers of one view; a fork takes a copy.

    `P` counts what attention sees: page 0, packed tiles, the pages after them.
    """

    masks: NDArray[np.uint64]
    """[P, L, Hkv] live masks, one bit per token of the tile; pages beyond are live."""
    last_hit: NDArray[np.int32]
    """[L, P, Hkv, S] the last position whose row looked at a token."""
    watch: Watch
    protected: Spans = ()
    """Tokens that are never evicted."""
    packed_end: int = 0
    """From there on, `gap` pages are missing before each."""
    gap: int = 0
    pending: bool = False
    """Whether tokens were evicted since it was last seen to what may be packed."""

    def copy(self) -> EvictState:
        """Return an independent copy."""
        return replace(self, masks=self.masks.copy(), last_hit=self.last_hit.copy())
