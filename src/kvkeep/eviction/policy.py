"""The eviction seam: which tokens of a view stay live, per layer and KV head."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from kvkeep.types import PAGE_TOKENS, FloatArray, Int32Array, PageSpec, UInt64Array
from kvkeep.watch import EvictState, Spans, Watch


class Look(NamedTuple):
    """What a view's only observed row of a step looked at, in one layer."""

    position: int
    hits: UInt64Array
    """[P, Hkv] a bit per token."""


class Evictor(Protocol):
    """Watches which tokens queries look at and masks the others.

    What it decides for a view follows from the view's own rows, in order of position.
    """

    def watch(self, prompt_tokens: int) -> Watch | None:
        """Return when a view of such a prompt is watched; None: never, and nothing is evicted."""

    def new_state(self, spec: PageSpec, watch: Watch, protected: Spans = ()) -> EvictState:
        """Return the state of a fresh view."""

    def thresholds(self, state: EvictState, position: int) -> FloatArray:
        """Return [L or 1, Hkv or 1] log2 of the weight that makes a hit; +inf: unobserved."""

    def observe(self, state: EvictState, layer: int, looks: Int32Array | Look) -> None:
        """Take in one layer's looks.

        Of several rows as stamps [P, Hkv, S]: the last position that looked at each token, -1
        where none did.
        """

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        """Return live masks [P, L, Hkv]; an empty array keeps everything."""


class KeepAll:
    """Nothing is ever evicted: the baseline."""

    def watch(self, prompt_tokens: int) -> Watch | None:
        """Nobody is watched."""

    def new_state(self, spec: PageSpec, watch: Watch, protected: Spans = ()) -> EvictState:
        """Return a state with no masks and no stamps."""
        return empty_state(spec, watch, protected)

    def thresholds(self, state: EvictState, position: int) -> FloatArray:
        """No query is observed."""
        return np.full((1, 1), np.inf, np.float32)

    def observe(self, state: EvictState, layer: int, looks: Int32Array | Look) -> None:
        """Nothing is remembered."""

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        """Everything stays live."""
        return state.masks


def positions(state: EvictState, pages: int) -> Int32Array:
    """Return [P, S] positions; those of packed tiles are lower than their tokens' own."""
    index = np.arange(pages, dtype=np.int32)
    index[state.packed_end :] += state.gap
    found: Int32Array = (index[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).astype(np.int32)
    return found


def empty_state(spec: PageSpec, watch: Watch, protected: Spans = ()) -> EvictState:
    """Return a state that has seen nothing."""
    layers, heads = spec.num_layers, spec.num_kv_heads
    masks = np.zeros((0, layers, heads), np.uint64)
    return EvictState(masks, np.zeros((layers, 0, heads, PAGE_TOKENS), np.int32), watch, protected)
