"""What coded pages that are streamed are worth between a prefill and a decode worker.

Two workers in processes of their own, with pools of their own and half of the threads each, serve
random weights of a small real model's shapes. Lengths are drawn from the percentiles of published
traces, divided by 8 and cut at 4,096 tokens; prompts of 64 tokens and more are split. The link is
emulated: so slow that 16-bit pages, sent when their prompt is computed, are 10, 25 or 42 % of an
unloaded request's time under way. Requests come at 0.5, 0.8 and 0.95 of what those are measured to
be served at, by a Poisson process or in bursts.

A part is a trace over one link, `--only TRACE-SHARE`, and takes five to ten minutes: cells that do
not fit are left out and counted. In each turn every way of serving plays the same requests: 16-bit
and 2-bit pages, streamed and not; in one of three turns forms for the link alone (fp8, KVQuant's
and CacheGen's), unstreamed, and one engine on all threads that computes prompts in chunks.
`TRACE-SHARE.2` is a second helping of turns. Parts that ended are kept in `build/disagg`, by
commit; without `--only` the figures are those of all that are kept, or of all parts where none is.
`--only router` says what a router adds to a request whose workers answer at once, `--only costs`
measures forms for the link by themselves, `--only ways` (`bench.disagg_ways`) compares how pages
are got at on one machine; `--only faults` (`bench.disagg_faults`)
kills workers and routers and breaks links beside 500 requests; with `--quick` beside 40, which
takes two minutes where nothing else runs, most of them starts of processes. What the simulator
makes of the same requests stands in rows of its own, as does what it makes of a published system
(`--only published`, `bench.disagg_published`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench import disagg_part, harness
from bench.disagg_faults import FULL as FULL_FAULTS
from bench.disagg_faults import QUICK as QUICK_FAULTS
from bench.disagg_faults import FaultRun, fault_figures, fault_row, measure_faults
from bench.disagg_figures import (
    part_row,
    phase_rows,
    reduction_figures,
    simulation,
    transfer_figures,
    variant_rows,
)
from bench.disagg_forms import LIKE, cost_rows
from bench.disagg_kept import all_kept, keep, kept
from bench.disagg_load import MOST_TOKENS, SCALE, Part, part_names, part_of
from bench.disagg_overhead import router_overhead
from bench.disagg_part import FULL, QUICK, Plan
from bench.disagg_published import published
from bench.disagg_ways import measure_ways
from bench.harness import Cell, Options, Report, Row
from kvkeep.models import make

COSTS: Final = "costs"
FAULTS: Final = "faults"
PUBLISHED: Final = "published"
ROUTER: Final = "router"
WAYS: Final = "ways"
OTHERS: Final = {COSTS, FAULTS, PUBLISHED, ROUTER, WAYS}
"""Parts that are no trace over a link."""
QUICK_PART: Final = "uniform_short-42"


def parts_of(options: Options) -> list[str]:
    """Return the parts to measure or to take from what is kept; raises `ConfigError`."""
    asked = [name for name in options.only if name not in OTHERS]
    for name in asked:
        part_of(name)
    if asked or options.only:
        return asked
    if options.quick:
        return [QUICK_PART]
    have = all_kept()
    return [name for name in have if name != FAULTS] if have else part_names()


def measured(names: Sequence[str], options: Options, plan: Plan) -> list[Part]:
    """Return the parts, each kept one as it was; the others are measured one after the other."""
    parts: list[Part] = []
    with TemporaryDirectory() as folder:
        model = Path(folder) / LIKE
        for name in names:
            part = None if options.quick else kept(name, Part)
            if part is None:
                if not model.exists():
                    make.make(LIKE, model, seed=0, layers=plan.layers)
                part = asyncio.run(disagg_part.measure(name, model, options.threads, plan))
                if not options.quick:
                    keep(name, part)
            parts.append(part)
    return parts


def faults(options: Options) -> FaultRun | None:
    """Return the fault run, where it is asked for, or all are and it fits or is kept."""
    asked = FAULTS in options.only or not (options.only or options.quick)
    run = None if options.quick else kept(FAULTS, FaultRun)
    if run is None and asked and (options.only or not all_kept()):
        run = measure_faults(QUICK_FAULTS if options.quick else FULL_FAULTS)
        if not options.quick:
            keep(FAULTS, run)
    return run if asked else None


def measure(options: Options) -> Report:
    """Measure the parts asked for."""
    broken = faults(options)
    plan = QUICK if options.quick else FULL
    parts = measured(parts_of(options), options, plan)
    figures, simulated = simulation(parts, plan.layers)
    rows: list[Row] = [part_row(part) for part in parts]
    rows += [row for part in parts for row in variant_rows(part)]
    rows += [row for part in parts for row in phase_rows(part)]
    rows += simulated
    if not options.only or COSTS in options.only:
        rows += cost_rows(1 if options.quick else harness.MIN_PAIRS)
    params: dict[str, Cell] = {
        "model": LIKE,
        "layers": plan.layers,
        "threads": options.threads,
        "quick": options.quick,
        "lengths": f"traces' percentiles by {SCALE:g}, up to {MOST_TOKENS}",
        "link": "emulated",
        "parts": ", ".join(f"{part.trace}-{part.share}" for part in parts),
    }
    figures = [*reduction_figures(parts), *transfer_figures(parts), *figures]
    if not options.only or ROUTER in options.only:
        figure, row = router_overhead(quick=options.quick)
        figures.append(figure)
        rows.append(row)
    if PUBLISHED in options.only or not (options.only or options.quick):
        predicted, simulated = published()
        figures += predicted
        rows += simulated
    if WAYS in options.only:
        compared, more = measure_ways(options.threads, quick=options.quick)
        figures += compared
        rows += more
    if broken is not None:
        figures += fault_figures(broken)
        rows.append(fault_row(broken))
    return Report("disagg", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("disagg", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
