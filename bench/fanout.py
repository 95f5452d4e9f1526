"""Many requests on one prefix: what reading it once is worth to an engine and to a server.

In this process, steps of one running batch take turns: prefix tree, request by request, and head by
head (a prefix stays in the last-level cache from one request to the next). The prefix's pages come
from a tier that makes them up. With `--peer P`, servers take turns on a prefix they have computed;
a row says which share of our steps chose the tree.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch

from bench import harness, peers
from bench.attention_cells import Machine, planner_for
from bench.harness import MIN_PAIRS, Cell, Estimate, Figure, Goal, Options, Report, Row, estimate
from bench.made_up import MadeUpPages, kv_shape
from bench.ours import TENANT, Ours, greedy
from kvkeep.attention.planner import AttentionPlanner, FlatPlanner, TreePlanner
from kvkeep.engine.backend import choose
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.options import EngineOptions
from kvkeep.eviction.policy import KeepAll
from kvkeep.models import make
from kvkeep.models.shapes import LIKE
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import (
    Attended,
    AttentionPlan,
    LayerKV,
    Observe,
)
from kvkeep.quant.codec import Float
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import BatchGeometry, Int32Array, View
from tests.oracles import Heads

MODELS: Final = ("qwen3-0.6b", "qwen2.5-0.5b")
PREFIX: Final = 16384
SERVER_PREFIX: Final = 4096
OWN: Final = 32
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
OF_RECORD: Final = 32
UNSHARED: Final = (1, 2, 4, 8, 16)
GOAL: Final = Goal(">=", 2.0)
TREE_SHARE: Final = 0.8
"""Of steps: below it a comparison says nothing about the tree."""


class Turns:
    """A planner that is another one from step to step, and what planning takes."""

    def __init__(self, now: AttentionPlanner) -> None:
        self.now = now
        self.seconds = 0.0

    def plan(self, geometry: BatchGeometry) -> AttentionPlan:
        """Return the plan of the planner whose turn it is."""
        begun = time.perf_counter()
        plan = self.now.plan(geometry)
        self.seconds += time.perf_counter() - begun
        return plan

    def forget(self, view: View) -> None:
        """Pass it on."""
        self.now.forget(view)


class HeadByHead:
    """Attention that takes one KV head after the other, all requests of each, where it is on."""

    def __init__(self, inner: CpuAttention) -> None:
        self._inner = inner
        self._tables: list[Int32Array] = []
        self._plan: AttentionPlan | None = None
        self.on = False
        self.prepare_s = 0.0
        """Spent on cutting plans into work."""

    @property
    def bytes_read(self) -> int:
        """Return what was read so far."""
        return self._inner.bytes_read

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Write all heads' rows."""
        self._inner.append(kv, k, v, slots)

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Attend head by head, or as ever."""
        heads, fresh, self._plan = range(kv.num_kv_heads), plan is not self._plan, plan
        if not self.on:
            begun = time.perf_counter()
            if fresh:
                self._inner.prepare(q, kv, plan)
            self.prepare_s += time.perf_counter() - begun
            return self._inner.attend(q, kv, plan, observe)
        if fresh:
            self._tables = [kv.tile_table[:, :, h : h + 1].copy() for h in heads]
        out, lse2 = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2])
        group = q.shape[1] // kv.num_kv_heads
        for head in heads:
            part = slice(head * group, (head + 1) * group)
            one = replace(kv, tile_table=self._tables[head], num_kv_heads=1)
            out[:, part], lse2[:, part], *_ = self._inner.attend(q[:, part], one, plan)
        return Attended(out, lse2, None)

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge as ever."""
        return self._inner.merge(outs, lse2s)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine whose prefixes come from nowhere, and the ways of attending it takes turns at."""

    ours: Ours
    turns: Turns
    heads: HeadByHead
    tree: TreePlanner

    def step_s(self, way: str) -> float:
        """Return the seconds of one decoding step, attended in one way."""
        self.turns.now = self.tree if way == "tree" else FlatPlanner()
        self.heads.on = way == "head by head"
        begun = time.perf_counter()
        self.ours.core.step()
        return time.perf_counter() - begun

    def start(self, batch: int, prefix: int, *, shared: bool) -> None:
        """Set a batch decoding that ends when it is told to."""
        core, common = self.ours.core, self.ours.prompt(prefix)
        core.set_tenants({})
        core.set_tenants({TENANT: 1.0})
        for _ in range(batch):
            start = common if shared else self.ours.prompt(prefix)
            self.ours.submit((*start, *self.ours.prompt(OWN)), greedy(4096), scope="fanout")
        fresh = 0
        while fresh < batch:
            before = core.counters.generated_tokens
            self.step_s("tree")
            fresh = core.counters.generated_tokens - before

    def turns_of(self, ways: Sequence[str], rounds: int) -> dict[str, list[float]]:
        """Return each way's step seconds; the order alternates from round to round."""
        found: dict[str, list[float]] = {way: [] for way in ways}
        for index in range(rounds):
            for way in ways if index % 2 else reversed(ways):
                found[way].append(self.step_s(way))
        return found


def engine_of(like: str, model: Path, machine: Machine, kv_cache_bytes: int) -> Engine:
    """Return a warm engine on random weights."""
    shape = kv_shape(like)
    query_heads = Heads(LIKE[like]["num_attention_heads"], shape.num_kv_heads, shape.head_dim)
    turns = Turns(FlatPlanner())
    backend = choose(EngineOptions(model=str(model), kernel=machine.kernel), machine.threads)
    assert isinstance(backend.ops.attention, CpuAttention)
    heads = HeadByHead(backend.ops.attention)
    parts = Parts(
        techniques=Techniques(Float(), NoShield(), KeepAll()),
        planner=turns,
        policy=ShareNothing(),
        tier=MadeUpPages(Float(), shape),
        backend=replace(backend, ops=replace(backend.ops, attention=heads)),
    )
    ours = Ours(model, threads=machine.threads, kv_cache_bytes=kv_cache_bytes, parts=parts)
    return Engine(ours, turns, heads, planner_for(machine, query_heads))


def plan_share(engine: Engine, options: Options) -> Figure:
    """Return planning over step, cutting the plan into work included, for 64 requests."""
    engine.start(BATCHES[-1], 1024 if options.quick else SERVER_PREFIX, shared=True)
    shares = []
    for _ in range(3 if options.quick else 2 * MIN_PAIRS):
        before = engine.turns.seconds + engine.heads.prepare_s
        took = engine.step_s("tree")
        shares.append((engine.turns.seconds + engine.heads.prepare_s - before) / took)
    return Figure("plan_share", estimate(shares), Goal("<=", 0.01))


WAYS: Final = ("tree", "request by request", "head by head")


def in_process(like: str, engine: Engine, options: Options) -> tuple[list[Figure], Row]:
    """Return what the tree is worth to a batch on one long prefix."""
    batch, prefix = (8, 4096) if options.quick else (OF_RECORD, PREFIX)
    engine.start(batch, prefix, shared=True)
    before = engine.ours.core.stats()
    took = engine.turns_of(WAYS, 3 if options.quick else MIN_PAIRS)
    after = engine.ours.core.stats()
    steps = (after.steps_total - before.steps_total) / len(WAYS)
    tree_share = (after.attention_tree_steps_total - before.attention_tree_steps_total) / steps
    tree, flat, heads = (np.array(took[way]) for way in WAYS)
    row: Row = {
        "model": like,
        "requests": batch,
        "prefix_tokens": prefix,
        "tree_tokens_per_s": batch / float(np.median(tree)),
        "request_outer_tokens_per_s": batch / float(np.median(flat)),
        "head_outer_tokens_per_s": batch / float(np.median(heads)),
        "tree_share": tree_share,
    }
    suffix = "" if like == MODELS[0] else "_" + like.replace("-", "_").replace(".", "_")
    return [
        Figure(f"e2e_{batch}_vs_flat{suffix}", estimate(flat / tree), None if suffix else GOAL),
        Figure(f"e2e_{batch}_vs_head_outer{suffix}", estimate(heads / tree)),
    ], row


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What memory and registers allow."""

    gb_s: float
    gflop_s: float
    weight_bytes: int
    token_bytes: int
    """Of K and V, all layers."""
    token_flops: float
    """Of one query over one token, all layers and heads."""

    def step_s(self, batch: int, prefix: int, *, shared: bool) -> float:
        """Return the seconds of a decoding step at the roof: memory's or arithmetic's."""
        read = self.weight_bytes + self.token_bytes * prefix * (1 if shared else batch)
        flops = batch * (self.weight_bytes + self.token_flops * prefix)
        return max(read / (self.gb_s * 1e9), flops / (self.gflop_s * 1e9))


def sweep(engine: Engine, ceiling: Ceiling, options: Options) -> list[Row]:
    """Return tokens per second from 1 to 64 requests, on one prefix and each on its own."""
    rows: list[Row] = []
    prefix = 1024 if options.quick else SERVER_PREFIX
    for shared, batches in ((True, BATCHES), (False, UNSHARED)):
        for batch in batches[:2] if options.quick else batches:
            engine.start(batch, prefix, shared=shared)
            took = engine.turns_of(WAYS[:2], 3)
            row: Row = {
                "case": "one prefix" if shared else "each its own",
                "prefix_tokens": prefix,
                "requests": batch,
                "tree_tokens_per_s": batch / float(np.median(took[WAYS[0]])),
                "request_outer_tokens_per_s": batch / float(np.median(took[WAYS[1]])),
                "roof_tokens_per_s": batch / ceiling.step_s(batch, prefix, shared=shared),
            }
            rows.append(row)
    return rows


def ceiling_of(engine: Engine, machine: Machine, like: str) -> Ceiling:
    """Return the ceilings of an engine: the best of several readings, so that they are above it."""
    info, fields = engine.ours.core.info, LIKE[like]
    gb_s = max(machine.reader.best_gb_s() for _ in range(MIN_PAIRS))
    peak = max(machine.peak.measure_gflop_s() for _ in range(5 * MIN_PAIRS))
    flops = 4.0 * info.num_layers * fields["num_attention_heads"] * info.head_dim
    return Ceiling(gb_s, peak, engine.ours.core.weight_bytes, info.bytes_per_token, flops)


def beside(
    peer: str, model: Path, batches: Sequence[int], options: Options
) -> tuple[list[Figure], list[Row]]:
    """Return our server's rate over a peer's, from batch to batch."""
    figures: list[Figure] = []
    rows: list[Row] = []
    prefix = 1024 if options.quick else SERVER_PREFIX
    with (
        peers.runner(peer, peers.python_of(peer), model, options.threads) as theirs,
        peers.runner("kvkeep", Path(sys.executable), model, options.threads) as ours,
    ):
        for batch in batches:
            asked: dict[str, int | str] = {"run": "fanout", "batch": batch, "prefix": prefix}
            asked |= {"prompt": OWN, "tokens": 24}
            shares: list[float] = []

            def our_rate(asked: dict[str, int | str] = asked, to: list[float] = shares) -> float:
                reply = ours.measure(asked)
                to.append(float(reply["tree_share"]))
                return float(reply["tokens_per_s"])

            found = harness.interleave(
                our_rate,
                lambda asked=asked: float(theirs.measure(asked)["tokens_per_s"]),  # type: ignore[misc]
                MIN_PAIRS if batch == OF_RECORD and not options.quick else 3,
            )
            rate: Estimate = harness.ratio(found)
            rows.append(
                {
                    "peer": f"{peer} {theirs.ready['version']}",
                    "requests": batch,
                    "prefix_tokens": prefix,
                    "ours_tokens_per_s": float(np.median([p.ours for p in found])),
                    "theirs_tokens_per_s": float(np.median([p.theirs for p in found])),
                    "tree_share": min(shares),
                }
            )
            if batch == OF_RECORD and min(shares) >= TREE_SHARE:
                figures.append(Figure(f"e2e_32_vs_{peer}", rate, GOAL))
    return figures, rows


def measure(options: Options) -> Report:
    """Measure in process, then beside every peer asked for."""
    figures: list[Figure] = []
    rows: list[Row] = []
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        if options.peers:
            model = make.make(MODELS[0], folder / MODELS[0], seed=0)
            for peer in options.peers:
                found, lines = beside(peer, model, BATCHES, options)
                figures += found
                rows += lines
        else:
            machine = Machine(options.threads)
            for like in MODELS[: 1 if options.quick else 2]:
                model = make.make(like, folder / like, seed=0)
                engine = engine_of(like, model, machine, (2 if options.quick else 9) << 30)
                found, line = in_process(like, engine, options)
                figures += found
                rows.append(line)
                if like == MODELS[-1]:
                    figures.append(plan_share(engine, options))
                else:
                    rows += sweep(engine, ceiling_of(engine, machine, like), options)
                del engine
    params: dict[str, Cell] = {
        "dtype": "bfloat16",
        "threads": options.threads,
        "quick": options.quick,
        "own_tokens": OWN,
    }
    return Report("fanout", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("fanout", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
