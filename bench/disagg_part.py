"""One part of `kvkeep bench disagg`: a trace over one link, every way of serving it in turns."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from bench.disagg_costs import MEASURED_ON, measured
from bench.disagg_load import (
    BASE,
    CACHEGEN,
    CELLS,
    CODED,
    COLOCATED,
    FP8,
    KVQUANT,
    OURS,
    STREAMED,
    VARIANTS,
    Cell,
    Part,
    Played,
    Run,
    Variant,
    drawn,
    link_bytes_per_s,
    part_of,
)
from bench.disagg_workers import Workers, alone, pair, play, play_in_turn, served
from kvkeep.cli.console import NOTES
from kvkeep.engine.speeds import Speeds
from kvkeep.sim.cluster import PHASES
from kvkeep.sim.load import Drawn

TIME_S: Final = 360.0
"""No turn begins that would end later; a second helping plays more."""
RUN_S: Final = 20.0
REQUESTS: Final = (4, 24)
"""Of a run, at least and at most."""
UNLOADED: Final = 4
CORE: Final = (BASE, STREAMED, CODED, OURS)
"""They play in every turn, the others in one of three."""
OTHERS_EVERY: Final = 3
WARM: Final = Drawn(np.zeros(1), np.array([160]), np.array([4]))


class Link(NamedTuple):
    """How fast a part's link is, and what an unloaded request takes beside it."""

    rest_s: float
    bytes_per_s: float
    token_s: float
    """Of a prompt."""

    @property
    def speeds(self) -> Speeds:
        """Return what its workers are told."""
        return Speeds(link_bytes_per_s=self.bytes_per_s, token_s=self.token_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a part may take."""

    time_s: float = TIME_S
    requests: tuple[int, int] = REQUESTS
    unloaded: int = UNLOADED
    turns: int = 1000
    layers: int = 28
    link: Link | None = None
    """None: measured, so that transfers take the part's share of the time."""


FULL: Final = Plan()
QUICK: Final = Plan(
    requests=(3, 3),
    unloaded=2,
    turns=1,
    layers=2,
    link=Link(rest_s=1.0, bytes_per_s=2e7, token_s=2e-4),
)


async def measure(name: str, model: Path, threads: int, plan: Plan) -> Part:
    """Measure a part: the link, what it takes unloaded, capacity, costs of steps, then turns."""
    begun = time.monotonic()
    trace, share, helping = part_of(name)
    seed = zlib.crc32(f"{trace} {share} {helping}".encode())
    some = drawn(trace, plan.unloaded, CELLS[0], 1.0, zlib.crc32(trace.encode()))
    link = plan.link or await _link_of(share, some, model, threads)
    mbytes = link.bytes_per_s / 1e6
    NOTES.print(f"{name}: {link.rest_s:.2f} s unloaded, a link of {mbytes:.1f} MB/s")
    serving = {
        "bf16": pair(model, "bf16", threads, link.speeds, plan.layers),
        "k2v2": pair(model, "k2v2", threads, link.speeds, plan.layers),
        "": alone(model, threads, plan.layers),
    }
    async with served(*serving.values()):
        for variant in (FP8, KVQUANT, CACHEGEN, COLOCATED):  # what is learnt is learnt before
            await play_in_turn(serving[_who(variant)], variant, WARM)
        steps = {
            kv: await measured(serving[kv], variant, int(some.prompt_tokens.max()))
            for kv, variant in MEASURED_ON.items()
        }
        slowed = await play_in_turn(serving["bf16"], BASE, some)
        moved = sum(map(moved_s, slowed)) / sum(one.jct_s for one in slowed)
        capacity = await _capacity(serving["bf16"], trace, plan, link.rest_s, seed)
        NOTES.print(f"{name}: {moved:.0%} under way, {capacity:.3f} requests/s at most")
        runs = await _turns(serving, name, plan, capacity, begun)
    played = {(run.rate, run.arrivals) for run in runs}
    return Part(
        trace=trace,
        share=share,
        link_bytes_per_s=link.bytes_per_s,
        token_s=link.token_s,
        measured_share=moved,
        capacity_per_s=capacity,
        measured=steps,
        runs=tuple(runs),
        left_out=len(CELLS) - len(played),
    )


async def _link_of(share: int, some: Drawn, model: Path, threads: int) -> Link:
    """Measure requests one after another where nothing slows the link; return the part's link."""
    free = pair(model, "bf16", threads, None)
    async with served(free):
        await play_in_turn(free, BASE, WARM)
        found = await play_in_turn(free, BASE, some)
    rest_s = float(np.mean([one.jct_s - moved_s(one) for one in found]))
    mean_bytes = float(np.mean([one.received_bytes + one.received_rows_bytes for one in found]))
    took_s = sum(one.phases[PHASES.index("prefill")] for one in found)
    token_s = took_s / sum(one.prompt_tokens for one in found)
    return Link(rest_s, link_bytes_per_s(mean_bytes, rest_s, share), token_s)


def moved_s(one: Played) -> float:
    """Return how long a request waited for its pages."""
    return one.phases[PHASES.index("transfer")]


async def _capacity(workers: Workers, trace: str, plan: Plan, rest_s: float, seed: int) -> float:
    """Return how many requests a second are served where all are there at once."""
    count = int(np.clip(2 * RUN_S / rest_s, *plan.requests))
    load = drawn(trace, count, CELLS[0], 1.0, seed + 1)
    found = await play(workers, BASE, load._replace(at_s=np.zeros(count)))
    return count / max(one.jct_s for one in found)


async def _turns(
    serving: dict[str, Workers], name: str, plan: Plan, capacity: float, begun: float
) -> list[Run]:
    """Play cell after cell, in each every variant, while there is time."""
    trace, share, helping = part_of(name)
    runs: list[Run] = []
    took: dict[bool, float] = {}
    for turn in range(plan.turns):
        cell = CELLS[(turn + helping - 1) % len(CELLS)]
        whole = turn % OTHERS_EVERY == 0
        since = time.monotonic()
        count = int(np.clip(round(RUN_S * capacity * cell.rate), *plan.requests))
        run_s = (count / cell.rate + 1) / capacity
        left_s = plan.time_s - (since - begun)
        whole = whole and took.get(True, len(VARIANTS) * run_s) <= left_s
        if turn and took.get(whole, len(CORE) * run_s) > left_s:
            break
        seed = zlib.crc32(f"{trace} {share} {helping} {turn}".encode())
        load = drawn(trace, count, cell, capacity, seed)
        runs += await _turn(serving, cell, turn, load, whole=whole)
        took[whole] = max(took.get(whole, 0.0), time.monotonic() - since)
        NOTES.print(
            f"{name}: {cell.rate:g} of capacity, {cell.arrivals}: {time.monotonic() - since:.0f} s"
        )
    return runs


def _who(variant: Variant) -> str:
    return "" if variant.colocated else variant.kv


async def _turn(
    serving: dict[str, Workers], cell: Cell, turn: int, load: Drawn, *, whole: bool
) -> list[Run]:
    """Play one load in every way; who is first changes from turn to turn."""
    variants: tuple[Variant, ...] = VARIANTS if whole else CORE
    first = turn % len(variants)
    runs = []
    for variant in variants[first:] + variants[:first]:
        played = await play(serving[_who(variant)], variant, load)
        runs.append(Run(variant.name, cell.rate, cell.arrivals, turn, played))
    return runs
