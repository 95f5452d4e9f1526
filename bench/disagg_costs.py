"""What the steps of a run's own workers cost, and what the simulator makes of its loads.

Costs are measured on the workers that the loads are played to: prompts of whole blocks, behind
which nothing is computed again, while an answer is decoded beside them, then answers, one and side
by side, while the prefill worker computes. Each is the median over a record's parts, whose workers
are alike: one part measures each of them once. What is simulated stands in tables of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import numpy as np

from bench.disagg_load import (
    BLOCKS,
    LEAST_TOKENS,
    OURS,
    STREAMED,
    Measured,
    Part,
    Played,
    Run,
    Variant,
)
from bench.disagg_workers import CHUNK_TOKENS, MAX_ROWS, Workers, answered, asked
from bench.harness import Row
from kvkeep.engine.api import EngineClient
from kvkeep.engine.speeds import GIGABIT_BYTES
from kvkeep.sim.cluster import PHASES, Cluster, Link, Simulation, Tenants
from kvkeep.sim.costs import Chunk, CodecCosts, Costs, Step, fit_prefill, fit_steps
from kvkeep.sim.load import Drawn
from kvkeep.sim.workers import Size

STEP_TOKENS: Final = 2 * CHUNK_TOKENS
"""Of prompts, that a step computes."""
LENGTHS: Final = (128, 256, 384, 640, 1280, 2560)
FEWEST: Final = 5
"""Lengths that fix a prompt's costs, its chunks' and pairs' among them."""
ROWS: Final = (1, 2, 4)
SHORT: Final = 48
"""Tokens of the prompts whose answers are decoded side by side: below `LEAST_TOKENS`."""
ANSWER: Final = 13
BESIDE: Final = 128
"""Tokens of the answer that is decoded beside prompts."""
_NUMBERS: Final = itertools.count(1_000_000)
"""Of prompts, none of which was sent before."""


async def measured(workers: Workers, variant: Variant, longest: int) -> Measured:
    """Measure a pair of workers: prompts up to a trace's longest, answers of several rows.

    Each is measured while the other worker computes too, as it does in a load: they share what a
    machine's cores share.
    """
    lengths = [length for length in LENGTHS if length <= max(longest, LENGTHS[FEWEST - 1])]
    assert workers.prefill is not None
    await workers.fresh(variant.form)
    client = workers.client(variant)
    async with _busy(workers, workers.decode, SHORT, BESIDE):
        told = await _in_turn(workers, client, lengths)
    chunks = [
        Chunk(one.prompt_tokens, 0, _phase(one, "prefill"), -(-one.prompt_tokens // STEP_TOKENS))
        for one in told
    ]
    async with _busy(workers, workers.prefill, STEP_TOKENS, 1):
        alone = await _in_turn(workers, workers.decode, [length + 1 for length in lengths])
        steps = [Step(1, one.prompt_tokens + ANSWER // 2, _step_s(one)) for one in alone]
        for rows in ROWS:
            found = await asyncio.gather(
                *(_in_turn(workers, workers.decode, [SHORT]) for _ in range(rows))
            )
            took_s = float(np.median([_step_s(one) for (one,) in found]))
            steps.append(Step(rows, rows * (SHORT + ANSWER // 2), took_s))
    tokens = sum(lengths)
    pages = sum(one.received_pages for one in told) * 64
    return Measured(
        chunks,
        steps,
        sum(one.received_bytes for one in told) / pages,
        sum(_phase(one, "quantise") for one in told) / tokens,
        float(np.median([one.handover_s or 0.0 for one in told])),
    )


async def _in_turn(workers: Workers, client: EngineClient, lengths: Sequence[int]) -> list[Played]:
    """Return what became of prompts of these lengths, one after another."""
    return [
        await answered(client, asked(next(_NUMBERS), length, ANSWER, workers.tenant), 0.0)
        for length in lengths
    ]


@asynccontextmanager
async def _busy(
    workers: Workers, client: EngineClient, prompt: int, answer: int
) -> AsyncIterator[None]:
    """Keep an engine at such requests, one after another."""

    async def ask() -> None:
        while True:
            await answered(client, asked(next(_NUMBERS), prompt, answer, workers.tenant), 0.0)

    asking = asyncio.ensure_future(ask())
    try:
        yield
    finally:
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking


def _step_s(one: Played) -> float:
    return _phase(one, "decode") / (one.answer_tokens - 1)


def _phase(one: Played, name: str) -> float:
    return one.phases[PHASES.index(name)]


T = TypeVar("T", Chunk, Step)


def pooled(parts: Sequence[Part]) -> dict[str, Measured]:
    """Return the medians of what all parts have measured of each form."""
    return {name: _pooled([part.measured[name] for part in parts]) for name in MEASURED_ON}


def _pooled(found: Sequence[Measured]) -> Measured:
    chunks = [chunk for one in found for chunk in one.chunks]
    steps = [step for one in found for step in one.steps]
    rest = (float(np.median(one)) for one in zip(*(one[2:] for one in found), strict=True))
    return Measured(
        _medians(chunks, lambda one: (one.tokens, one.context, one.chunks)),
        _medians(steps, lambda one: (one.rows, one.context)),
        *rest,
    )


def _medians(found: Sequence[T], alike: Callable[[T], Hashable]) -> list[T]:
    """Return one of each kind, with the median of their times."""
    kinds: dict[Hashable, list[T]] = defaultdict(list)
    for one in found:
        kinds[alike(one)].append(one)
    return [
        kind[0]._replace(took_s=float(np.median([one.took_s for one in kind])))
        for kind in kinds.values()
    ]


def fitted(found: Mapping[str, Measured], source: str) -> Costs:
    """Return the costs of all forms; a prompt takes the same in all of them, coding aside."""
    prefill = fit_prefill([chunk for one in found.values() for chunk in one.chunks])
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


def predicted_s(part: Part, costs: Costs, run: Run, variant: Variant, layers: int) -> float:
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
        link=Link(
            part.link_bytes_per_s / GIGABIT_BYTES, 0.0, variant.streamed, token_s=part.token_s
        ),
        prefill_size=size,
        decode_size=size,
        layers=layers,
        least_tokens=LEAST_TOKENS,
    )
    return Simulation(cluster, costs, Tenants()).run(load).jct()


def simulated_rows(
    part: Part, costs: Costs, variants: tuple[Variant, ...], layers: int
) -> list[Row]:
    """Return what was simulated of a part's runs beside what was measured."""
    known = {variant.name: variant for variant in variants}
    rows: list[Row] = []
    for run in part.runs:
        if (variant := known.get(run.variant)) is None:
            continue
        simulated = predicted_s(part, costs, run, variant, layers)
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
                "error": abs(simulated / run.jct_s - 1),
            }
        )
    return rows


MEASURED_ON: Final = {"bf16": STREAMED, "k2v2": OURS}
"""By form: how prompts travel while its costs are measured."""
