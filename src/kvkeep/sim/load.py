"""Requests like those of published traces: lengths by their percentiles, arrivals by rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvkeep.errors import ConfigError

Seconds = NDArray[np.float64]
Counts = NDArray[np.int64]

GRID: Final = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.9, 100)
"""Percentiles that a trace is given by."""

Arrivals = Literal["poisson", "gamma", "bursts"]
GAMMA_SHAPE: Final = 0.835
"""Of the time between two requests of Azure's conversations."""
BURST_S: Final = 16.7
PAUSE_S: Final = 43.0
"""Mean lengths of bursts and of pauses between them, in Azure's code trace."""


class Lengths(NamedTuple):
    """Tokens of prompts and answers at the percentiles of `GRID`; drawn independently."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    source: str


def uniform(prompt: tuple[int, int], answer: tuple[int, int], source: str) -> Lengths:
    """Return lengths between two bounds, all as likely."""

    def row(low: int, high: int) -> tuple[int, ...]:
        return tuple(round(low + (high - low) * percent / 100) for percent in GRID)

    return Lengths(row(*prompt), row(*answer), source)


def _row(percentiles: str) -> tuple[int, ...]:
    return tuple(map(int, percentiles.split()))


_AZURE: Final = "AzurePublicDataset, LLM inference traces of 2023"
_ARTIFACT: Final = "uniform loads of HACK's published code"
TRACES: Final[Mapping[str, Lengths]] = {
    "azure_code": Lengths(
        _row("3 17 35 75 147 386 770 1075 1469 1909 2433 3192 5188 7303 7436 7436 7437 7437"),
        _row("6 6 6 6 7 8 9 11 13 16 20 29 55 90 171 251 825 1899"),
        _AZURE,
    ),
    "azure_conv": Lengths(
        _row("2 29 91 181 207 387 403 703 1020 1071 1130 1315 2734 4083 4098 4142 6179 14050"),
        _row("7 16 24 41 54 77 91 103 129 177 384 400 424 451 540 601 954 1000"),
        _AZURE,
    ),
    "mooncake_conv": Lengths(
        _row(
            "891 894 896 901 964 1662 3263 4993 6909 9570"
            " 13196 17869 27367 39550 66449 85400 121301 126195"
        ),
        _row("1 3 3 10 24 100 213 291 350 399 447 504 597 698 892 1119 2000 2000"),
        "Mooncake's traces, FAST 2025",
    ),
    "uniform_short": uniform((2000, 6000), (64, 128), _ARTIFACT),
    "uniform_long": uniform((12000, 16000), (256, 512), _ARTIFACT),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a cluster."""

    trace: str
    requests: int
    per_second: float
    arrivals: Arrivals = "poisson"
    seed: int = 0
    scale: float = 1.0
    """Lengths are multiplied by it."""
    most_tokens: int | None = None
    """A prompt and its answer are cut to so many, the prompt first."""

    def __post_init__(self) -> None:
        if self.trace not in TRACES:
            raise ConfigError(f"trace: no {self.trace!r}; there are {', '.join(TRACES)}")
        if self.requests < 1:
            raise ConfigError(f"requests: {self.requests} are none; ask for 1 at least")
        if self.per_second <= 0 or self.scale <= 0:
            raise ConfigError("per_second and scale must be above 0")
        if self.most_tokens is not None and self.most_tokens < 2:
            raise ConfigError("most_tokens: a prompt and its answer take 2 at least")


class Drawn(NamedTuple):
    """Requests in the order of their arrival."""

    at_s: Seconds
    prompt_tokens: Counts
    answer_tokens: Counts


def draw(load: Load) -> Drawn:
    """Return a load's requests; the same load gives the same ones."""
    chance = np.random.default_rng(load.seed)
    told = TRACES[load.trace]
    prompt = _lengths(told.prompt, load, chance)
    answer = _lengths(told.answer, load, chance)
    if load.most_tokens is not None:
        answer = np.minimum(answer, load.most_tokens - 1)
        prompt = np.minimum(prompt, load.most_tokens - answer)
    return Drawn(arrivals_of(load, chance), prompt, answer)


def arrivals_of(load: Load, chance: np.random.Generator) -> Seconds:
    """Return when requests arrive, in seconds, at the load's mean rate."""
    mean_s = 1 / load.per_second
    match load.arrivals:
        case "poisson":
            return np.cumsum(chance.exponential(mean_s, load.requests))
        case "gamma":
            return np.cumsum(chance.gamma(GAMMA_SHAPE, mean_s / GAMMA_SHAPE, load.requests))
        case "bursts":
            return _bursts(load, chance)


def _bursts(load: Load, chance: np.random.Generator) -> Seconds:
    """Return arrivals by a faster process that runs in bursts and stands still between them."""
    busy_share = BURST_S / (BURST_S + PAUSE_S)
    busy_at = np.cumsum(chance.exponential(busy_share / load.per_second, load.requests))
    shift, burst_ends, at = 0.0, chance.exponential(BURST_S), np.empty_like(busy_at)
    for i, busy_s in enumerate(busy_at):
        while busy_s > burst_ends:
            shift += chance.exponential(PAUSE_S)
            burst_ends += chance.exponential(BURST_S)
        at[i] = busy_s + shift
    return at


def _lengths(row: tuple[int, ...], load: Load, chance: np.random.Generator) -> Counts:
    """Return lengths between a trace's percentiles, on a logarithmic scale."""
    drawn = np.exp(np.interp(chance.random(load.requests) * 100, GRID, np.log(row)))
    return np.maximum(1, np.rint(drawn * load.scale)).astype(np.int64)
