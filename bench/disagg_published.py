"""The part `published` of `kvkeep bench disagg`: the simulator at a published system's size.

HACK's code was published with what its authors measured of one prefill and one decode worker, an
A6000 each, Qwen3-8B, 12 to 16 thousand tokens of prompt and 256 to 512 of answer over 10 Gb/s. The
simulator is given their kernels' times and bytes, and takes from their row of 16-bit pages at the
lower rate what a token of a prompt and a decode step cost. What it says of the other three rows is
a prediction, and `sim_error_published_...` the most that it is off in one of them. Coding pages
costs nothing there: the published times have it in the prefill.

All times here are simulated or were measured by others: none is of kvkeep on such a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from bench.harness import Estimate, Figure, Row
from kvkeep.sim.cluster import PHASES, Cluster, Link, Outcome, Simulation, Tenants
from kvkeep.sim.costs import CodecCosts, Costs
from kvkeep.sim.load import Drawn, Load, draw
from kvkeep.sim.workers import Size

LAYERS: Final = 36
BYTES_PER_TOKEN: Final = 147_456.0
"""Of Qwen3-8B's keys and values in 16 bits."""
WHOLE_MIB: Final = {"bf16": 1954, "hack": 326}
"""Of a request, as published."""
OURS_PER_TOKEN: Final = 23_040.0
"""Of `k2v2`'s closed pages: 80 bytes a token and head."""
KERNEL_TOKENS: Final = (1024, 131_072)
KERNEL_US: Final = {"bf16": (7.5, 760.0), "hack": (10.0, 238.0)}
"""Published times of one layer's decode attention over so many tokens."""
LINKS: Final = (10.0, 25.0, 50.0)
"""Gb/s: the paper's."""
TRACE: Final = "uniform_long"
CHUNK_TOKENS: Final = 2048
REQUESTS: Final = 2000
SEEDS: Final = 5
HALVINGS: Final = 14
WAITS: Final = frozenset(("queue", "prefill", "quantise", "transfer", "install"))
"""Phases before the first token, which the published system tells where it decodes."""


class Told(NamedTuple):
    """A published row."""

    rate: float
    codec: str
    jct_s: float
    ttft_s: float


TOLD: Final = (
    Told(0.15, "bf16", 17.11, 5.54),
    Told(0.15, "hack", 15.13, 3.33),
    Told(0.30, "bf16", 24.13, 9.06),
    Told(0.30, "hack", 16.99, 4.78),
)
FITTED: Final = TOLD[0]


class Way(NamedTuple):
    """A way of serving."""

    name: str
    codec: str
    streamed: bool


WAYS: Final = (
    Way("bf16", "bf16", streamed=False),
    Way("bf16, streamed", "bf16", streamed=True),
    Way("hack, as published", "hack", streamed=False),
    Way("k2v2, streamed", "k2v2", streamed=True),
)


@dataclass(frozen=True, slots=True)
class Times:
    """Means over loads of other seeds."""

    jct_s: float
    ttft_s: float
    transfer_share: float


def codec_costs(name: str) -> CodecCosts:
    """Return a form's costs; `k2v2` is taken to be attended to as fast as published codes are."""
    first, last = KERNEL_US["bf16" if name == "bf16" else "hack"]
    per_token = (last - first) / (KERNEL_TOKENS[1] - KERNEL_TOKENS[0]) * LAYERS / 1e6
    if name == "k2v2":
        return CodecCosts(OURS_PER_TOKEN, per_token, block_tokens=128)
    share = WHOLE_MIB[name] / WHOLE_MIB["bf16"]
    return CodecCosts(BYTES_PER_TOKEN * share, per_token)


def costs_of(prefill_s_per_token: float, step_s: float) -> Costs:
    """Return the costs of the published machines."""
    return Costs(
        source="published with HACK's code: Qwen3-8B, A6000",
        bytes_per_token=BYTES_PER_TOKEN,
        chunk_s=0.0,
        prefill_s_per_token=prefill_s_per_token,
        prefill_s_per_token_pair=0.0,
        step_s=step_s,
        row_s=0.0,
        codecs={name: codec_costs(name) for name in ("bf16", "hack", "k2v2")},
    )


def simulate(costs: Costs, way: Way, rate: float, gigabits_per_s: float) -> Times:
    """Play loads of several seeds to one prefill and one decode worker."""
    cluster = Cluster(
        way.codec,
        link=Link(gigabits_per_s, streamed=way.streamed),
        prefill_size=Size(CHUNK_TOKENS),
        decode_size=Size(CHUNK_TOKENS),
        layers=LAYERS,
    )
    found = [Simulation(cluster, costs, Tenants()).run(load) for load in _loads(rate)]
    return Times(
        jct_s=float(np.mean([one.jct() for one in found])),
        ttft_s=float(np.mean([one.jct() * _waiting(one) for one in found])),
        transfer_share=float(np.mean([one.phase_shares()["transfer"] for one in found])),
    )


def fit() -> Costs:
    """Return costs with which the simulator tells the fitted row's times."""
    way = WAYS[0]

    def told(prefill_s: float, step_s: float) -> Times:
        return simulate(costs_of(prefill_s, step_s), way, FITTED.rate, LINKS[0])

    prefill_s = _where(FITTED.ttft_s, 1e-5, 4e-4, lambda x: told(x, 0.02).ttft_s)
    step_s = _where(FITTED.jct_s, 1e-3, 1e-1, lambda x: told(prefill_s, x).jct_s)
    return costs_of(prefill_s, step_s)


def published() -> tuple[list[Figure], list[Row]]:
    """Return how far predictions are off at most, and what is simulated over the paper's links."""
    costs = fit()
    rates = sorted({told.rate for told in TOLD})
    known = {(told.rate, told.codec): told for told in TOLD}
    rows: list[Row] = [{"part": "published", **told._asdict()} for told in TOLD]
    errors: dict[str, list[float]] = {"jct": [], "ttft": []}
    for gigabits in LINKS:
        for rate in rates:
            found = {way: simulate(costs, way, rate, gigabits) for way in WAYS}
            for way, times in found.items():
                told = known.get((rate, way.codec))
                compared = told if gigabits == LINKS[0] and not way.streamed else None
                error = {} if compared is None else _errors(times, compared)
                if compared is not FITTED:
                    for name, value in error.items():
                        errors[name].append(value)
                rows.append(
                    {
                        "part": "simulated",
                        "gigabits_per_s": gigabits,
                        "rate": rate,
                        "variant": way.name,
                        "jct_simulated_s": times.jct_s,
                        "ttft_simulated_s": times.ttft_s,
                        "transfer_share": times.transfer_share,
                        "reduction_vs_bf16": 1 - times.jct_s / found[WAYS[0]].jct_s,
                        "jct_error": error.get("jct"),
                        "ttft_error": error.get("ttft"),
                    }
                )
    rows.append(
        {
            "part": "fitted",
            "prefill_us_per_token": costs.prefill_s_per_token * 1e6,
            "step_ms": costs.step_s * 1e3,
        }
    )
    figures = []
    for name, off in errors.items():
        worst = max(off)
        figures.append(
            Figure(f"sim_error_published_{name}", Estimate(worst, worst, worst, len(off)))
        )
    return figures, rows


def _errors(times: Times, told: Told) -> dict[str, float]:
    """Return how far what is simulated is from what was published."""
    return {
        "jct": abs(times.jct_s / told.jct_s - 1),
        "ttft": abs(times.ttft_s / told.ttft_s - 1),
    }


def _loads(rate: float) -> list[Drawn]:
    per_seed = REQUESTS // SEEDS
    return [draw(Load(TRACE, per_seed, rate, seed=seed)) for seed in range(SEEDS)]


def _waiting(outcome: Outcome) -> float:
    """Return the share of the time before first tokens."""
    shares = outcome.phase_shares()
    return sum(shares[name] for name in PHASES if name in WAITS)


def _where(goal: float, low: float, high: float, told: Callable[[float], float]) -> float:
    """Return where a growing function takes a value that lies between its ends'."""
    assert told(low) < goal < told(high), "the bounds are those of another machine"
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if told(middle) < goal else (low, middle)
    return (low + high) / 2
