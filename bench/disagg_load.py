"""Whose lengths are played how fast over which links, and what became of each request.

Lengths are inverse-CDF draws from the percentiles of `kvkeep.sim.load`: three are computed from
published traces, two are the uniform loads that HACK's code was published with. Each run takes one
from each equal part of a trace's distribution, so that all runs of a trace ask for about as much.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec
import numpy as np

from kvkeep.engine.moments import Moments
from kvkeep.errors import ConfigError
from kvkeep.sim.cluster import PHASES
from kvkeep.sim.costs import Chunk, Step
from kvkeep.sim.load import GRID, TRACES, Arrivals, Counts, Drawn, Load, arrivals_of

SCALE: Final = 1 / 8
MOST_TOKENS: Final = 4096
SHARES: Final = (10, 25, 42)
"""Percent of an unloaded request's time that 16-bit pages are under way, unstreamed."""
RATES: Final = (0.95, 0.8, 0.5)
"""Of what 16-bit pages, unstreamed, can be served."""
ARRIVALS: Final[tuple[Arrivals, ...]] = ("poisson", "bursts")
LEAST_TOKENS: Final = 64
"""Shorter prompts are not split: what is 512 by default, scaled as lengths are."""
BLOCKS: Final = {"bf16": 64, "k2v2": 128}
"""Tokens that are coded and handed over together, by form; rows behind them follow in 16 bits."""


class Variant(NamedTuple):
    """One way of serving."""

    name: str
    kv: str
    streamed: bool = False
    form: str = "plain"
    """In which pages travel."""
    colocated: bool = False


BASE: Final = Variant("bf16", "bf16")
STREAMED: Final = Variant("bf16, streamed", "bf16", streamed=True)
CODED: Final = Variant("k2v2", "k2v2")
OURS: Final = Variant("k2v2, streamed", "k2v2", streamed=True)
FP8: Final = Variant("fp8 for the link", "bf16", form="fp8")
KVQUANT: Final = Variant("kvquant for the link", "bf16", form="kvquant")
CACHEGEN: Final = Variant("cachegen for the link", "bf16", form="cachegen")
COLOCATED: Final = Variant("colocated", "bf16", colocated=True)
VARIANTS: Final = (BASE, STREAMED, CODED, OURS, FP8, KVQUANT, CACHEGEN, COLOCATED)


class Cell(NamedTuple):
    """How fast requests come."""

    rate: float
    arrivals: Arrivals


CELLS: Final = tuple(Cell(rate, arrivals) for rate in RATES for arrivals in ARRIVALS)


class Played(msgspec.Struct, frozen=True):
    """A request that was answered."""

    prompt_tokens: int
    answer_tokens: int
    at_s: float
    """After the run's first second."""
    ttft_s: float
    jct_s: float
    phases: tuple[float, ...]
    """Seconds, in the order of `PHASES`."""
    split: bool
    handover_s: float | None
    """From the later of its last page's being there and its first token's being told to its first
    step where it is answered; None of one that was not handed over."""
    received_bytes: int
    """Of pages."""
    received_pages: int
    received_rows_bytes: int = 0
    """Of the rows behind the last whole ones."""


class Run(msgspec.Struct, frozen=True):
    """A variant's turn."""

    variant: str
    rate: float
    arrivals: Arrivals
    turn: int
    requests: tuple[Played, ...]

    @property
    def jct_s(self) -> float:
        """Return the mean completion time."""
        return float(np.mean([one.jct_s for one in self.requests]))


class Measured(NamedTuple):
    """What the steps of one form's workers took."""

    chunks: list[Chunk]
    steps: list[Step]
    bytes_per_token: float
    encode_s_per_token: float
    handover_s: float


class Part(msgspec.Struct, frozen=True):
    """A trace over one link."""

    trace: str
    share: int
    link_bytes_per_s: float
    token_s: float
    """Of an unloaded prompt."""
    measured_share: float
    """Of unloaded requests' time, on that link."""
    capacity_per_s: float
    measured: dict[str, Measured]
    """By form."""
    runs: tuple[Run, ...]
    left_out: int
    """Cells that its time was too short for."""


def part_names() -> list[str]:
    """Return the names of all parts."""
    return [f"{trace}-{share}" for trace in TRACES for share in SHARES]


def part_of(name: str) -> tuple[str, int, int]:
    """Return trace, share and helping of `TRACE-SHARE[.HELPING]`; raises `ConfigError`."""
    base, _, helping = name.partition(".")
    trace, _, share = base.rpartition("-")
    if base not in part_names() or not (helping or "1").isdigit():
        known = ", ".join(part_names())
        raise ConfigError(f"only: there is no part {name!r}; there are costs, {known}")
    return trace, int(share), int(helping or "1")


def drawn(trace: str, requests: int, cell: Cell, per_second: float, seed: int) -> Drawn:
    """Return a run's requests; those of another seed have other arrivals and pairs of lengths."""
    chance = np.random.default_rng(seed)
    told = TRACES[trace]
    prompt = _strata(told.prompt, requests, chance)
    answer = np.minimum(_strata(told.answer, requests, chance), MOST_TOKENS - 1)
    load = Load(trace, requests, per_second * cell.rate, cell.arrivals)
    at_s = arrivals_of(load, chance)
    return Drawn(at_s - at_s[0], np.minimum(prompt, MOST_TOKENS - answer), answer)


def _strata(row: tuple[int, ...], requests: int, chance: np.random.Generator) -> Counts:
    """Return scaled lengths, one from each equal part of a distribution, in a random order."""
    percent = (np.arange(requests) + chance.random(requests)) * 100 / requests
    lengths = np.exp(np.interp(chance.permutation(percent), GRID, np.log(row)))
    found: Counts = np.maximum(1, np.rint(lengths * SCALE)).astype(np.int64)
    return found


def link_bytes_per_s(mean_bytes: float, rest_s: float, share: int) -> float:
    """Return how fast a link is on which so many bytes take a share of the whole time."""
    return mean_bytes * (100 - share) / (share * rest_s)


def phases_of(sent_s: float, ended_s: float, moments: tuple[Moments, ...]) -> tuple[float, ...]:
    """Return a request's phases in the order of `PHASES`; they add up to its completion time.

    What is not on the way to its last token is not counted: pages that came before the first token
    took no time. Of forms for the link, coding is part of `transfer` and widening of `install`.
    """
    there, here = moments[0], moments[-1]
    begun_s = there.begun_s or sent_s
    first_s = there.first_token_s or there.ended_s
    found = {
        "queue": begun_s - sent_s,
        "prefill": first_s - begun_s - there.encode_s,
        "quantise": there.encode_s,
    }
    at_s = first_s
    if len(moments) > 1:
        for phase, moment in (("transfer", here.received_s), ("install", here.installed_s)):
            found[phase] = max(0.0, (moment or at_s) - at_s)
            at_s += found[phase]
    found["decode"] = 0.0 if here.resumed_s is None else here.ended_s - max(here.resumed_s, at_s)
    found["other"] = ended_s - sent_s - sum(found.values())
    return tuple(found.get(name, 0.0) for name in PHASES)


def handover_s(moments: tuple[Moments, ...]) -> float | None:
    """Return how long an answer waited for its first step when all was there for it."""
    here = moments[-1]
    if len(moments) < 2 or here.installed_s is None or here.resumed_s is None:
        return None
    return here.resumed_s - max(here.installed_s, here.first_token_s or 0.0)
