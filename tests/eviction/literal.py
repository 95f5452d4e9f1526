"""CORM as it is published: a matrix of bits per head, rows of it kept; the oracle of `corm.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class LiteralHead:
    """One KV head of one sequence: the positions it still has, and their last w rows of bits."""

    def __init__(self, window: int, recent: int, *, sinks: int, birth_counts: bool) -> None:
        self._window = window
        self._recent = recent
        self._sinks = sinks
        self._birth_counts = birth_counts
        self.kept = np.zeros(0, np.int64)
        self._message = np.zeros((0, 0), np.bool_)

    def born(self, position: int) -> None:
        """Add a token, its column all zeros."""
        self.kept = np.append(self.kept, position)
        self._message = np.pad(self._message, ((0, 0), (0, 1)))

    def step(self, bits: Bools, *, evicts: bool = True) -> None:
        """Take in one query's bits of the kept tokens; the query's own is the last."""
        bits = np.append(bits[:-1], bits[-1] or self._birth_counts)
        self._message = np.vstack([self._message, bits])[-self._window :]
        if not evicts or len(self._message) < self._window:
            return
        latest = np.arange(len(self.kept)) >= len(self.kept) - self._recent
        keep: Bools = self._message.any(axis=0) | latest | (self.kept < self._sinks)
        self.kept, self._message = self.kept[keep], self._message[:, keep]


class Scores:
    """The scores [rows, Hkv, G, keys] of random queries and keys, and what follows from them."""

    def __init__(self, tokens: int, kv_heads: int, group: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        drift = np.cumsum(rng.normal(size=(tokens, kv_heads, group, 8)), axis=0) / 4
        keys = rng.normal(size=(tokens, kv_heads, 8))
        self._scores = np.einsum("qhgd,khd->qhgk", drift + rng.normal(size=drift.shape), keys)

    def probabilities(self, row: int, head: int, kept: NDArray[np.int64]) -> Floats:
        """Return [G, n] of a row over the tokens that are kept."""
        scores = self._scores[row, head][:, kept]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(weights / weights.sum(-1, keepdims=True))

    def excess2(self, row: int, head: int, kept: NDArray[np.int64]) -> Floats:
        """Return [G, n] log2 of the weights, as a kernel has them: scores less lse2."""
        scores2 = self._scores[row, head][:, kept] * np.log2(np.e)
        top = scores2.max(-1, keepdims=True)
        lse2 = top + np.log2(np.exp2(scores2 - top).sum(-1, keepdims=True))
        return np.asarray(scores2 - lse2)
