"""`kvkeep simulate --costs FILE`: how long would requests take on a cluster that is not there?"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from kvkeep.cli.console import NOTES, OUT, human_bytes, print_wide
from kvkeep.cli.options import new_app
from kvkeep.config import Settings
from kvkeep.sim.cluster import Cluster, Link, Outcome, Placement, Simulation, Tenants
from kvkeep.sim.costs import Costs, load_costs
from kvkeep.sim.load import Arrivals, Load, draw
from kvkeep.sim.workers import Size

LEAST_TOKENS: Final[int] = Settings.model_fields["cluster_least_tokens"].default

app = new_app("Plan a cluster on paper, from measured costs of steps.")

COLUMNS = (
    "codec",
    "transfer",
    "split from",
    "JCT mean",
    "JCT p99",
    "TTFT p50",
    "TTFT p99",
    "found",
    "link",
    "worker",
)


class Row(msgspec.Struct, frozen=True):
    """One way of serving the load."""

    codec: str
    transfer: str
    least_tokens: int
    """Shorter prompts are computed where they are answered."""
    jct_mean_s: float
    jct_p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    phases: dict[str, float]
    """Shares of the completion times."""
    hit_ratio: float
    busiest_link: float
    busiest_worker: float
    snapshot_bytes: float


class Plan(msgspec.Struct, frozen=True):
    """What `--json` prints: nothing in it was measured but `costs`."""

    simulated: bool
    costs: str
    trace: str
    requests: int
    per_second: float
    rows: list[Row]


def row_of(cluster: Cluster, transfer: str, outcome: Outcome) -> Row:
    """Return an outcome's row."""
    return Row(
        codec=cluster.codec,
        transfer=transfer,
        least_tokens=cluster.least_tokens,
        jct_mean_s=outcome.jct(),
        jct_p99_s=outcome.jct(99),
        ttft_p50_s=outcome.ttft(50),
        ttft_p99_s=outcome.ttft(99),
        phases=outcome.phase_shares(),
        hit_ratio=outcome.hit_ratio,
        busiest_link=outcome.busiest_link,
        busiest_worker=outcome.busiest_worker,
        snapshot_bytes=outcome.snapshot_bytes,
    )


def simulated(cluster: Cluster, costs: Costs, tenants: Tenants, load: Load) -> list[Row]:
    """Return the load on the cluster, with layers streamed and with all sent at the end."""
    drawn = draw(load)
    if not cluster.decode_workers:
        return [row_of(cluster, "none", Simulation(cluster, costs, tenants).run(drawn))]
    rows = []
    for transfer, streamed in (("streamed", True), ("at the end", False)):
        one = replace(cluster, link=replace(cluster.link, streamed=streamed))
        rows.append(row_of(one, transfer, Simulation(one, costs, tenants).run(drawn)))
    return rows


def show(plan: Plan) -> None:
    """Print the plan's rows, and where their time went."""
    title = f"simulated, not measured: {plan.requests:,} requests, {plan.per_second:g} a second"
    cells = [
        (
            row.codec,
            row.transfer,
            row.least_tokens if row.transfer != "none" else "",
            f"{row.jct_mean_s:.2f} s",
            f"{row.jct_p99_s:.2f} s",
            f"{row.ttft_p50_s:.2f} s",
            f"{row.ttft_p99_s:.2f} s",
            f"{row.hit_ratio:.0%}",
            f"{row.busiest_link:.0%}",
            f"{row.busiest_worker:.0%}",
        )
        for row in plan.rows
    ]
    print_wide(OUT, COLUMNS, cells, title)
    phases = [*plan.rows[0].phases]
    shares = [
        (row.codec, row.transfer, row.least_tokens, *(f"{row.phases[name]:.1%}" for name in phases))
        for row in plan.rows
    ]
    print_wide(OUT, ("codec", "transfer", "split from", *phases), shares, "where the time goes")
    if any(row.snapshot_bytes for row in plan.rows):
        sent = ", ".join(f"{row.codec} {human_bytes(row.snapshot_bytes)}" for row in plan.rows)
        OUT.print(f"public prefixes fetched by workers: {sent}")
    NOTES.print(f"costs of steps: {plan.costs}")


@app.command()
def simulate(
    costs: Annotated[Path, typer.Option(help="JSON file of measured costs of steps")],
    trace: Annotated[str, typer.Option(help="lengths: a published trace's name")] = "azure_conv",
    rate: Annotated[float, typer.Option(help="requests a second")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, help="how many")] = 2000,
    arrivals: Annotated[Arrivals, typer.Option(help="their spacing")] = "poisson",
    codec: Annotated[
        list[str] | None, typer.Option(help="one of the measured codecs; may be repeated")
    ] = None,
    prefill: Annotated[int, typer.Option(min=1, help="prefill workers")] = 1,
    decode: Annotated[
        int, typer.Option(min=0, help="decode workers; 0: the others do both, in chunks")
    ] = 1,
    least_tokens: Annotated[
        list[int] | None,
        typer.Option(min=0, help="shorter prompts are not split; may be repeated (512)"),
    ] = None,
    link_gbps: Annotated[float, typer.Option(help="of a prefill worker's link")] = 10.0,
    chunk_tokens: Annotated[int, typer.Option(min=64, help="of a prompt in one step")] = 512,
    max_rows: Annotated[int, typer.Option(min=1, help="answers that a worker decodes")] = 64,
    memory_gib: Annotated[float, typer.Option(help="for answers' keys and values")] = 64.0,
    layers: Annotated[int, typer.Option(min=1, help="of the model")] = 28,
    placement: Annotated[Placement, typer.Option(help="of requests")] = "affine",
    tenants: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    templates: Annotated[int, typer.Option(min=0, help="that prompts begin with")] = 0,
    template_tokens: Annotated[int, typer.Option(min=0, help="of each")] = 1024,
    public_templates: Annotated[int, typer.Option(min=0, help="shared by all tenants")] = 0,
    cache_tokens: Annotated[int, typer.Option(min=0, help="kept by a prefill worker")] = 0,
    scale: Annotated[float, typer.Option(help="factor of all lengths")] = 1.0,
    most_tokens: Annotated[int | None, typer.Option(help="of a prompt with its answer")] = None,
    seed: Annotated[int, typer.Option(help="of lengths, arrivals and tenants")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
) -> None:
    """Plan a cluster on paper; everything it prints is simulated."""
    measured = load_costs(costs)
    names = codec or [*measured.codecs]
    load = Load(trace, requests, rate, arrivals, seed, scale, most_tokens)
    asking = Tenants(tenants, templates, template_tokens, public_templates, seed)
    rows: list[Row] = []
    for name, least in product(names, least_tokens or [LEAST_TOKENS]):
        size = Size(chunk_tokens, max_rows, memory_gib * (1 << 30))
        cluster = Cluster(
            codec=name,
            prefill_workers=prefill,
            decode_workers=decode,
            link=Link(link_gbps),
            prefill_size=size,
            decode_size=size,
            placement=placement,
            layers=layers,
            least_tokens=least,
            cache_tokens=cache_tokens,
        )
        rows += simulated(cluster, measured, asking, load)
    plan = Plan(True, measured.source, trace, requests, rate, rows)
    if as_json:
        sys.stdout.write(msgspec.json.encode(plan).decode() + "\n")
    else:
        show(plan)
