"""From the runs of `kvkeep bench disagg` to its figures and rows.

A sample is one turn: the mean completion times of two ways of serving that played the same requests
one after the other. A figure is the mean over turns, its interval that of resampled turns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Final

import numpy as np

from bench.disagg_costs import fitted, pooled, simulated_rows
from bench.disagg_load import (
    BASE,
    BLOCKS,
    CELLS,
    CODED,
    COLOCATED,
    KVQUANT,
    OURS,
    STREAMED,
    VARIANTS,
    Part,
    Played,
    Run,
    Variant,
)
from bench.harness import RESAMPLES, Cell, Estimate, Figure, Goal, Row, estimate
from kvkeep.sim.cluster import PHASES
from kvkeep.types import PAGE_TOKENS

SIMULATED: Final = (BASE, STREAMED, CODED, OURS)
TRANSFER: Final = PHASES.index("transfer")


def mean_estimate(samples: Sequence[float], *, seed: int = 0) -> Estimate:
    """Return the mean and its 95 % bootstrap interval."""
    values = np.asarray(samples, np.float64)
    picks = np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), int(values.size))


def reductions(part: Part, ours: Variant, theirs: Variant) -> dict[float, list[float]]:
    """Return by rate how much shorter ours took than theirs, turn by turn."""
    runs = {(run.variant, run.turn): run for run in part.runs}
    found: dict[float, list[float]] = defaultdict(list)
    for run in part.runs:
        if run.variant == ours.name and (theirs.name, run.turn) in runs:
            found[run.rate].append(1 - run.jct_s / runs[theirs.name, run.turn].jct_s)
    return dict(found)


def reduction_figures(parts: Sequence[Part]) -> list[Figure]:
    """Return the largest and the mean reduction against each way of sending."""
    told = (
        (BASE, "bf16", Goal(">=", 0.75), Goal(">=", 0.45)),
        (STREAMED, "bf16_streamed", None, None),
        (KVQUANT, "kvquant", Goal(">=", 0.55), None),
        (COLOCATED, "colocated", None, None),
    )
    figures = []
    for theirs, name, most_goal, mean_goal in told:
        places: dict[tuple[str, int, float], list[float]] = defaultdict(list)
        for part in parts:
            for rate, samples in reductions(part, OURS, theirs).items():
                places[part.trace, part.share, rate] += samples
        if not places:
            continue
        most = max(places.values(), key=lambda samples: float(np.mean(samples)))
        every = [sample for samples in places.values() for sample in samples]
        figures.append(Figure(f"jct_reduction_vs_{name}_max", mean_estimate(most), most_goal))
        figures.append(Figure(f"jct_reduction_vs_{name}_mean", mean_estimate(every), mean_goal))
    return figures


def page_bytes(runs: Iterable[Run], variant: Variant) -> float:
    """Return what each further page of a prompt took on the link, over all runs.

    A prompt's first page is larger where others are coded: whole requests are in the tables.
    """
    sent = [one for run in runs if run.variant == variant.name for one in run.requests]
    pages = np.array([one.received_pages for one in sent], float)
    sizes = np.array([one.received_bytes for one in sent], float)
    if len(np.unique(pages[pages > 0])) < 2:
        return float("nan")
    return float(np.polyfit(pages[pages > 0], sizes[pages > 0], 1)[0])


def transfer_figures(parts: Sequence[Part]) -> list[Figure]:
    """Return the bytes of coded pages, the share of transfer that shows, and the handover."""
    runs = [run for part in parts for run in part.runs]
    ours = [run for run in runs if run.variant == OURS.name]
    figures = []
    ratios = [page_bytes(part.runs, OURS) / page_bytes(part.runs, STREAMED) for part in parts]
    if ratios := [one for one in ratios if np.isfinite(one)]:
        figures.append(Figure("transfer_bytes_ratio", estimate(ratios), Goal("<=", 0.157)))
    if ours:
        exposed = [exposed_share(run) for run in ours]
        figures.append(Figure("transfer_exposed_share", mean_estimate(exposed), Goal("<=", 0.02)))
    handed = [
        one.handover_s * 1e3 for run in ours for one in run.requests if one.handover_s is not None
    ]
    if handed:
        figures.append(Figure("handover_ms_p50", estimate(handed), Goal("<=", 10)))
    return figures


def exposed_share(run: Run) -> float:
    """Return the share of completion times that requests waited for pages."""
    waited = sum(one.phases[TRANSFER] for one in run.requests)
    return waited / sum(one.jct_s for one in run.requests)


def simulation(parts: Sequence[Part], layers: int) -> tuple[list[Figure], list[Row]]:
    """Return how far the simulator is off, and what it said of each run."""
    if not parts:
        return [], []
    costs = fitted(pooled(parts), "the workers of these parts")
    rows = [row for part in parts for row in simulated_rows(part, costs, SIMULATED, layers)]
    errors = [float(row["error"] or 0) for row in rows]
    figures = [Figure("sim_error", estimate(errors), Goal("<=", 0.10))] if errors else []
    return figures, rows


def part_row(part: Part) -> Row:
    """Return a part's link and capacity."""
    return {
        "part": "link",
        "trace": part.trace,
        "link_share": part.share / 100,
        "link_mbytes_per_s": part.link_bytes_per_s / 1e6,
        "unloaded_share": part.measured_share,
        "bf16_requests_per_s": part.capacity_per_s,
        "cells_left_out": part.left_out,
    }


def variant_rows(part: Part) -> list[Row]:
    """Return each way's completion times, for each rate and spacing."""
    rows: list[Row] = []
    for cell, variant in product(CELLS, VARIANTS):
        runs = _runs(part, cell.rate, cell.arrivals, variant)
        if not runs:
            continue
        requests = [one for run in runs for one in run.requests]
        jct = [one.jct_s for one in requests]
        sent = sum(one.received_bytes + one.received_rows_bytes for one in requests)
        rows.append(
            {
                "part": "jct",
                **_place(part, variant),
                "rate": cell.rate,
                "arrivals": cell.arrivals,
                "turns": len(runs),
                "requests": len(requests),
                "split": sum(one.split for one in requests) / len(requests),
                "pages_handed_over": handed_share(requests, variant),
                "jct_mean_s": float(np.mean(jct)),
                "jct_p99_s": float(np.percentile(jct, 99)),
                "ttft_mean_s": float(np.mean([one.ttft_s for one in requests])),
                "kib_per_request": sent / len(requests) / 1024,
            }
        )
    return rows


def handed_share(requests: Sequence[Played], variant: Variant) -> float | None:
    """Return the part of the pages that can be handed over that was; the others were computed."""
    block = BLOCKS[variant.kv]
    can = sum(one.prompt_tokens // block * block for one in requests if one.split) // PAGE_TOKENS
    return sum(one.received_pages for one in requests) / can if can else None


def phase_rows(part: Part) -> list[Row]:
    """Return where the time of requests goes, over all rates; in milliseconds."""
    rows: list[Row] = []
    for variant in VARIANTS:
        requests = [one for run in part.runs if run.variant == variant.name for one in run.requests]
        if not requests:
            continue
        row: dict[str, Cell] = {"part": "phases", **_place(part, variant)}
        row["requests"] = len(requests)
        for at, name in enumerate(PHASES):
            told = [one.phases[at] * 1e3 for one in requests]
            row[f"{name}_mean_ms"] = float(np.mean(told))
            row[f"{name}_p99_ms"] = float(np.percentile(told, 99))
        handed = [one.handover_s * 1e3 for one in requests if one.handover_s is not None]
        row["handover_p50_ms"] = float(np.median(handed)) if handed else None
        rows.append(row)
    return rows


def _place(part: Part, variant: Variant) -> dict[str, Cell]:
    return {"trace": part.trace, "link_share": part.share / 100, "variant": variant.name}


def _runs(part: Part, rate: float, arrivals: str, variant: Variant) -> list[Run]:
    return [
        run
        for run in part.runs
        if (run.rate, run.arrivals, run.variant) == (rate, arrivals, variant.name)
    ]
