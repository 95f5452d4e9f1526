"""The eviction seam: which tokens of a view stay live, per layer and KV head."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvkeep.types import EvictState, PageSpec, UInt64Array


class Evictor(Protocol):
    """Watches which tokens queries look at and masks the others."""

    def new_state(self, spec: PageSpec) -> EvictState:
        """Return the state of a fresh view."""

    def thresholds(self, state: EvictState, position: int) -> float:
        """Return log2 of the weight that makes a hit at `position`; +inf: unobserved."""

    def observe(self, state: EvictState, layer: int, hits: UInt64Array, position: int) -> None:
        """Take in hits [P, Hkv] of one layer, seen by a query at `position`."""

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        """Return live masks [P, L, Hkv]; an empty array keeps everything."""


class KeepAll:
    """Nothing is ever evicted: the baseline."""

    def new_state(self, spec: PageSpec) -> EvictState:
        """Return a state with no masks and no stamps."""
        shape = (0, spec.num_layers, spec.num_kv_heads)
        return EvictState(np.zeros(shape, np.uint64), np.zeros(shape, np.int32))

    def thresholds(self, state: EvictState, position: int) -> float:
        """No query is observed."""
        return float("inf")

    def observe(self, state: EvictState, layer: int, hits: UInt64Array, position: int) -> None:
        """Nothing is remembered beyond the tokens seen."""
        state.seen_tokens = max(state.seen_tokens, position + 1)

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        """Everything stays live."""
        return state.masks
