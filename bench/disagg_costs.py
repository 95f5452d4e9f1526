"""What the steps of a run's own workers cost, and what the simulator makes of its loads.

Costs are measured on the workers that the loads are played to: prompts of whole blocks one after
another, behind which nothing is computed again, then answers side by side while the prefill worker
computes as well. What is simulated stands in tables of its own.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

import numpy as np

from bench.disagg_load import (
    BLOCKS,
    LEAST_TOKENS,
    OURS,
    STREAMED,
    Part,
    Played,
    Run,
    Variant,
)
from bench.disagg_workers import CHUNK_TOKENS, MAX_ROWS, Workers, answered, asked, play_in_turn
from bench.harness import Row
from kvkeep.sim.cluster import GIGABIT_BYTES, PHASES, Cluster, Link, Simulation, Tenants
from kvkeep.sim.costs import Chunk, CodecCosts, Costs, Step, fit_prefill, fit_steps
from kvkeep.sim.load import Drawn
from kvkeep.sim.workers import Size

STEP_TOKENS: Final = 2 * CHUNK_TOKENS
"""Of prompts, that a step computes."""
LENGTHS: Final = (128, 256, 384, 640, 1280, 2560)
FEWEST: Final = 3
"""Lengths that fix a prompt's costs."""
ROWS: Final = (1, 2, 4)
SHORT: Final = 48
"""Tokens of the prompts whose answers are decoded side by side: below `LEAST_TOKENS`."""
ANSWER: Final = 13


class Measured(NamedTuple):
    """What one form's workers took."""

    chunks: list[Chunk]
    steps: list[Step]
    bytes_per_token: float
    encode_s_per_token: float
    handover_s: float


async def measured(workers: Workers, variant: Variant, longest: int) -> Measured:
    """Measure a pair of workers: prompts up to a trace's longest, answers of several rows."""
    lengths = [length for length in LENGTHS if length <= max(longest, LENGTHS[FEWEST - 1])]
    answers = np.full(len(lengths), ANSWER)
    load = Drawn(np.zeros(len(lengths)), np.array(lengths), answers)
    told = await play_in_turn(workers, variant, load)
    chunks = [
        Chunk(one.prompt_tokens, 0, _phase(one, "prefill"), -(-one.prompt_tokens // STEP_TOKENS))
        for one in told
    ]
    steps = [Step(1, one.prompt_tokens + ANSWER // 2, _step_s(one)) for one in told]
    steps += [
        Step(rows, rows * (SHORT + ANSWER // 2), await _rows_s(workers, rows)) for rows in ROWS
    ]
    tokens = sum(lengths)
    pages = sum(one.received_pages for one in told) * 64
    return Measured(
        chunks,
        steps,
        sum(one.received_bytes for one in told) / pages,
        sum(_phase(one, "quantise") for one in told) / tokens,
        float(np.median([one.handover_s or 0.0 for one in told])),
    )


async def _rows_s(workers: Workers, rows: int) -> float:
    """Return a decode step's seconds while the prefill worker computes."""
    await workers.fresh("rows")
    assert workers.prefill is not None
    other = asyncio.ensure_future(
        answered(workers.prefill, asked(99, 8 * SHORT, 2, workers.tenant), 0.0)
    )
    short = [asked(i, SHORT, ANSWER, workers.tenant) for i in range(rows)]
    found = await asyncio.gather(*(answered(workers.decode, one, 0.0) for one in short))
    await other
    return float(np.median([_step_s(one) for one in found]))


def _step_s(one: Played) -> float:
    return _phase(one, "decode") / (one.answer_tokens - 1)


def _phase(one: Played, name: str) -> float:
    return one.phases[PHASES.index(name)]


def fitted(found: dict[str, Measured], source: str) -> Costs:
    """Return the costs of all forms."""
    prefill = fit_prefill(found["bf16"].chunks)
    steps = fit_steps({name: one.steps for name, one in found.items()})
    return Costs(
        source=source,
        bytes_per_token=found["bf16"].bytes_per_token,
        chunk_s=prefill.chunk_s,
        prefill_s_per_token=prefill.token_s,
        prefill_s_per_token_pair=prefill.pair_s,
        step_s=steps.step_s,
        row_s=steps.row_s,
        handover_s=float(np.mean([one.handover_s for one in found.values()])),
        codecs={
            name: CodecCosts(
                bytes_per_token=one.bytes_per_token,
                context_s_per_token=steps.context_s[name],
                encode_s_per_token=one.encode_s_per_token,
                block_tokens=BLOCKS[name],
            )
            for name, one in found.items()
        },
    )


def predicted_s(part: Part, run: Run, variant: Variant, layers: int) -> float:
    """Return the mean completion time that the simulator gives a run's requests."""
    rows = run.requests
    load = Drawn(
        np.array([one.at_s for one in rows]),
        np.array([one.prompt_tokens for one in rows]),
        np.array([one.answer_tokens for one in rows]),
    )
    size = Size(STEP_TOKENS, MAX_ROWS)
    cluster = Cluster(
        variant.kv,
        link=Link(part.link_bytes_per_s / GIGABIT_BYTES, 0.0, variant.streamed),
        prefill_size=size,
        decode_size=size,
        layers=layers,
        least_tokens=LEAST_TOKENS,
    )
    return Simulation(cluster, part.costs, Tenants()).run(load).jct()


def simulated_rows(part: Part, variants: tuple[Variant, ...], layers: int) -> list[Row]:
    """Return what was simulated of a part's runs beside what was measured."""
    known = {variant.name: variant for variant in variants}
    rows: list[Row] = []
    for run in part.runs:
        if (variant := known.get(run.variant)) is None:
            continue
        simulated = predicted_s(part, run, variant, layers)
        rows.append(
            {
                "part": "simulated",
                "trace": part.trace,
                "link_share": part.share / 100,
                "variant": run.variant,
                "rate": run.rate,
                "arrivals": run.arrivals,
                "turn": run.turn,
                "jct_simulated_s": simulated,
                "jct_measured_s": run.jct_s,
                "error": abs(simulated / run.jct_s - 1),
            }
        )
    return rows


MEASURED_ON: Final = {"bf16": STREAMED, "k2v2": OURS}
"""By form: how prompts travel while its costs are measured."""
