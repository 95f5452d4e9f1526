"""Counters and histograms of one engine, read by the admin port."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from kvkeep.engine.api import FinishReason, Histogram
from kvkeep.engine.sequence import Request

TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
TPOT_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
E2E_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
STEP_BOUNDS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


class Observations:
    """A histogram being filled."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Histogram:
        """Return cumulative counts per upper bound, +inf last."""
        running, counts = 0, []
        for count in self._counts:
            running += count
            counts.append(running)
        return Histogram(
            bounds=(*self._bounds, float("inf")), counts=tuple(counts), total=self._total
        )


@dataclass(slots=True)
class EngineCounters:
    """What an engine counts while it runs; times in seconds."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cache_queries: int = 0
    saved_tokens: int = 0
    cache_hits: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    finished: Counter[FinishReason] = field(default_factory=Counter)
    chosen: Counter[str] = field(default_factory=Counter)
    """Requests by the form their pages take."""
    ttft: Observations = field(default_factory=lambda: Observations(TTFT_BOUNDS_S))
    tpot: Observations = field(default_factory=lambda: Observations(TPOT_BOUNDS_S))
    e2e: Observations = field(default_factory=lambda: Observations(E2E_BOUNDS_S))
    step: Observations = field(default_factory=lambda: Observations(STEP_BOUNDS_S))

    def begin(self, request: Request, now: float) -> None:
        """Count a request's first token."""
        self.ttft.add(now - request.arrived_s)
        self.chosen[request.codec] += 1
        self.cache_queries += len(request.spec.prompt_ids)
        self.cache_hits += request.saved_tokens
        self.saved_tokens += request.saved_tokens - (request.cached_tokens or 0)
