"""How much of what requests have seen is still attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvkeep.engine.api import EvictStats
from kvkeep.types import PAGE_TOKENS, Segment
from kvkeep.watch import EvictState


@dataclass(slots=True)
class EvictCounts:
    """Counts of tokens are means over layers and KV heads."""

    seen_tokens: float = 0.0
    """Over all rows of requests that may lose tokens: those up to the row."""
    live_tokens: float = 0.0
    """Of these, those that the row attends to; over `seen_tokens`, the footprint."""
    prompt_tokens: int = 0
    kept_tokens: float = 0.0
    """Tokens of these prompts that were kept at their ends."""

    def take(self, segments: Sequence[Segment]) -> None:
        """Count a step's rows, before what they lead to is decided."""
        for segment in segments:
            state = segment.view.evict
            if state is not None:
                self._rows(segment, dropped_tokens(state))

    def decided(self, segments: Sequence[Segment]) -> None:
        """Count what is left of the prompts that end in a step."""
        for segment in segments:
            state, end = segment.view.evict, segment.first_position + segment.num_rows
            if state is not None and end == state.watch.prompt_tokens:
                self.prompt_tokens += end
                self.kept_tokens += end - dropped_tokens(state)

    def stats(self, packed_views: int, freed_bytes: int, unpacked: int) -> EvictStats:
        """Return the figures for the admin port."""
        return EvictStats(
            seen_tokens_total=self.seen_tokens,
            live_tokens_total=self.live_tokens,
            prompt_tokens_total=self.prompt_tokens,
            prompt_kept_tokens_total=self.kept_tokens,
            packed_views_total=packed_views,
            freed_bytes_total=freed_bytes,
            masked_only_total=unpacked,
        )

    def _rows(self, segment: Segment, dropped: float) -> None:
        rows = segment.num_rows
        seen = rows * segment.first_position + rows * (rows + 1) // 2
        self.seen_tokens += seen
        self.live_tokens += seen - rows * dropped


def dropped_tokens(state: EvictState) -> float:
    """Return how many of a view's tokens are gone, a mean over layers and KV heads."""
    pages, layers, heads = state.masks.shape
    if not pages:
        return 0.0
    bits = int(np.bitwise_count(state.masks).sum())
    return float((pages + state.gap) * PAGE_TOKENS - bits / (layers * heads))
