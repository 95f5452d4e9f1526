"""What eviction gains and costs in time and memory: steps of two engines that take turns.

Random weights of known shapes; prompts' pages come from a tier that makes them up. What is kept is
prescribed (`bench/prescribed.py`), observing is not. Bytes are those that sequences hold in the
pool, cached pages that nothing uses aside, with recent tokens beside coded pages and stamps.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Estimate, Figure, Goal, Options, Report, Row, Stages
from bench.made_up import MadeUpPages, kv_shape
from bench.ours import Ours, Weights
from bench.prescribed import KEPT, Prescribed, demo_shares
from bench.quant_e2e import BATCH, Side, model_in
from kvkeep import ops
from kvkeep.cache.packing import Cuts, Moving
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.packer import TILES
from kvkeep.eviction.corm import PRESETS, Corm
from kvkeep.eviction.policy import Evictor, KeepAll, Look
from kvkeep.ops.layout import AttentionPlan, LayerKV, Observe, float_tile_bytes
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, FloatArray, Int32Array, Layout, UInt64Array, View

LIKE: Final = "qwen3-0.6b"
PREFIX: Final = 32_512
QUICK: Final = 2_048
PARTS: Final = ("observe", "decode", "bytes")
STAMP_BYTES: Final = 4
ASKED: Final = 4.0
"""c of the threshold whose cost has a goal: a key in thirty has as much. The preset's is higher."""


def side_of(
    model: Path,
    codec: Codec,
    evictor: Evictor,
    memory_bytes: int,
    threads: int,
    weights: Weights | None = None,
) -> Side:
    """Return a warm engine whose prompts come from nowhere."""
    parts = Parts(
        techniques=Techniques(codec, NoShield(), evictor),
        policy=ShareNothing(),
        tier=MadeUpPages(codec, kv_shape(LIKE)),
        backend=weights.backend if weights else None,
        model=weights.model if weights else None,
    )
    return Side(
        Ours(
            model,
            threads=threads,
            kv_cache_bytes=memory_bytes,
            max_num_seqs=BATCH,
            parts=parts,
        )
    )


def token_bytes(codec: Codec) -> int:
    """Return the bytes of a token in pages of a codec."""
    return codec.page_spec(kv_shape(LIKE)).bytes_per_token


def held_bytes(side: Side, sequences: int) -> int:
    """Return what running sequences hold: pages, own tiles, and the most of recent tokens."""
    core = side.ours.core
    (use,) = core.stats().tenants
    held = (use.used_pages - use.unused_pages) * core.info.bytes_per_token * PAGE_TOKENS
    return held + sequences * (core.info.window_tokens or 0) * token_bytes(Float()) // 2


def memory_for(codec: Codec, prefix: int, *, whole: int = BATCH) -> int:
    """Return the memory of an engine for a batch of such contexts, `whole` of them at a time."""
    contexts = whole + KEPT * (BATCH - whole)
    return int(1.02 * contexts * (prefix + 256) * token_bytes(codec)) + (1 << 27)


def decode(
    folder: Path, shares: FloatArray, options: Options, stages: Stages
) -> tuple[Figure, Row]:
    """Measure steps of a batch that keeps everything and of one that kept a quarter, in turn."""
    prefix = QUICK if options.quick else PREFIX
    model = model_in(folder, LIKE)
    weights = Weights.of(model, options.threads)
    stages.done("decode: weights")
    evictors: tuple[tuple[Evictor, int], ...] = ((KeepAll(), BATCH), (Prescribed(shares), 1))
    sides = [
        side_of(
            model,
            Float(),
            one,
            memory_for(Float(), prefix, whole=whole),
            options.threads,
            weights,
        )
        for one, whole in evictors
    ]
    stages.done("decode: two engines")
    for side, (one, _) in zip(sides, evictors, strict=True):
        side.start(prefix)
        stages.done(f"decode: {BATCH} prompts of {prefix} tokens, {type(one).__name__}")
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(5 if options.quick else 3 * MIN_PAIRS):
        for at in (0, 1) if turn % 2 else (1, 0):
            took[at].append(sides[at].step_s())
    whole, kept = (np.array(seconds) for seconds in took)
    stages.done(f"decode: {len(whole)} steps of each")
    row: Row = {
        "figure": "decode_long_vs_keepall",
        "model": LIKE,
        "requests": BATCH,
        "prefix_tokens": prefix,
        "keepall_tokens_per_s": BATCH / float(np.median(whole)),
        "evicting_tokens_per_s": BATCH / float(np.median(kept)),
    }
    gain = harness.estimate((whole / kept).tolist())
    return Figure("decode_long_vs_keepall", gain, Goal(">=", 1.7)), row


def bytes_of(
    folder: Path, shares: FloatArray, options: Options, stages: Stages
) -> tuple[list[Figure], list[Row]]:
    """Return what one request holds of what it would in bfloat16, with and without codes."""
    prefix = QUICK if options.quick else PREFIX
    model, figures, rows = model_in(folder, LIKE), [], []
    codecs, peaks = (Float(), Hack(Layout.K4V2), Hack(Layout.K2V2)), []
    for codec in codecs:
        memory = memory_for(codec, prefix) + (3 << 29)
        side = side_of(model, codec, Prescribed(shares), memory, options.threads)
        watched = Moved(side)
        side.start(prefix, 1)
        stats, (use,) = side.ours.core.stats().evict, side.ours.core.stats().tenants
        seen = stats.prompt_tokens_total
        live = stats.prompt_kept_tokens_total
        stamps = int(live) * side.ours.core.info.num_layers * side.ours.core.info.num_kv_heads
        held = held_bytes(side, 1)
        whole = seen * token_bytes(Float())
        freed = stats.freed_bytes_total / ((seen - live) * token_bytes(codec))
        row: Row = {
            "kv": codec.name,
            "prefix_tokens": prefix,
            "kept": live / seen,
            "held_bytes": held,
            "stamp_bytes": STAMP_BYTES * stamps,
            "cached_unused_pages": use.unused_pages,
            "of_bf16": held / whole,
            "of_bf16_with_stamps": (held + STAMP_BYTES * stamps) / whole,
            "freed_of_removed": freed,
            "peak_over_steady": watched.peak_over_steady,
        }
        rows.append(row)
        stages.done(f"bytes: {codec.name}")
        suffix = "" if codec.name == "k2v2" else f"_{codec.name}"
        figures.append(_exactly(f"combined_bytes_ratio{suffix}", held / whole, Goal("<=", 0.06)))
        if isinstance(codec, Float):
            figures[-1] = _exactly("bytes_ratio_bf16", held / whole)
            figures.append(_exactly("freed_bytes_ratio", freed, Goal(">=", 0.9)))
        peaks.append(watched.peak_over_steady)
        del side, watched
        gc.collect()
    figures.append(_exactly("peak_over_steady_bytes", max(peaks), Goal("<=", 1.02)))
    return figures, rows


class Moved:
    """Watches how much a sequence holds while its live tokens move, beside what it held before."""

    def __init__(self, side: Side) -> None:
        self._core = side.ours.core
        (manager,) = self._core.caches.managers.values()
        self._manager, packing = manager, manager.packing
        self._begin, self._take = packing.begin, packing.take
        self._before = self._most = 0
        packing.begin, packing.take = self.begin, self.take  # type: ignore[method-assign]

    def begin(self, view: View, end: int, stays: Int32Array, cuts: Cuts) -> Moving:
        """Note what is held before anything moves."""
        (use,) = self._core.stats().tenants
        self._account = use.tenant
        self._before = self._most = self._manager.holds.pages(self._account)
        return self._begin(view, end, stays, cuts)

    def take(self, moving: Moving, wanted: NDArray[np.bool_]) -> None:
        """Note what is held once tiles for a part are there, and nothing of it is let go of."""
        self._take(moving, wanted)
        self._most = max(self._most, self._manager.holds.pages(self._account))

    @property
    def peak_over_steady(self) -> float:
        """Return the ratio, with the tiles that are put together outside the pool."""
        spec = self._manager.pool.spec
        beside = TILES * int(spec.tile_sizes().max())
        return (self._most * spec.page_bytes + beside) / (self._before * spec.page_bytes)


def _exactly(name: str, value: float, goal: Goal | None = None) -> Figure:
    """Return a count, that has no spread, as a figure."""
    return Figure(name, Estimate(value, value, value, MIN_PAIRS), goal)


def layer_of(context: int, heads: int, dim: int) -> LayerKV:
    """Return one layer of noise pages for a batch."""
    pages = BATCH * context // PAGE_TOKENS
    size = float_tile_bytes(Layout.BF16, dim)
    buffer = torch.randn(pages * heads * size // 2, generator=torch.Generator().manual_seed(0))
    raw = buffer.bfloat16().view(torch.uint8)
    table = np.arange(pages * heads, dtype=np.int32).reshape(pages, 1, heads)
    return LayerKV(raw, table, size, 0, heads, dim)


def plan_of(context: int) -> AttentionPlan:
    """Return a decode step of a batch, each request on pages of its own."""
    each = context // PAGE_TOKENS
    runs = [(i * each, each, 0, int(Layout.BF16)) for i in range(BATCH)]
    groups = [(i, i + 1, i, i + 1) for i in range(BATCH)]
    return AttentionPlan(
        np.full(BATCH, context - 1, np.int32),
        np.array(groups, np.int32),
        np.array(runs, np.int32),
        np.arange(BATCH * each, dtype=np.int32),
    )


def observe(options: Options) -> tuple[list[Figure], Row]:
    """Measure attention of a decode step with and without asking who was looked at.

    One row of each request is observed, so bits are asked for, as the engine does; `taken` is with
    the stamps that CORM's preset makes of them, `corm` is with that preset's own threshold.
    """
    context, kernels = QUICK if options.quick else PREFIX, ops.select("auto", options.threads)
    shape, query_heads = kv_shape(LIKE), 16
    kv, plan = layer_of(context, shape.num_kv_heads, shape.head_dim), plan_of(context)
    q = torch.randn((BATCH, query_heads, shape.head_dim)).bfloat16()
    asked, seldom = (
        Observe(np.full(BATCH, np.log2(weight / context), np.float32))
        for weight in (ASKED, PRESETS["corm"].weight)
    )
    corm, spec = Corm(PRESETS["corm"]), Float().page_spec(shape._replace(num_layers=1))
    states = [corm.new_state(spec, corm.watch(context)) for _ in range(BATCH)]

    def plain() -> None:
        kernels.attention.attend(q, kv, plan)

    def observed(asked: Observe = asked) -> UInt64Array:
        hits = kernels.attention.attend(q, kv, plan, asked).hits
        assert hits is not None
        return hits

    def taken() -> None:
        for state, hits in zip(states, np.split(observed(), BATCH), strict=True):
            corm.observe(state, 0, Look(context - 1, hits))

    figures = []
    row: Row = {"kernel": kernels.name, "context_tokens": context}
    for name, ours, goal in (
        ("observe_overhead", observed, Goal("<=", 0.03)),
        ("observe_overhead_taken", taken, None),
        ("observe_overhead_corm", partial(observed, seldom), None),
    ):
        pairs = harness.interleave(
            partial(_seconds, ours),
            partial(_seconds, plain),
            5 if options.quick else 3 * MIN_PAIRS,
        )
        over = harness.estimate([pair.ours / pair.theirs - 1 for pair in pairs])
        figures.append(Figure(name, over, goal))
        row = {
            **row,
            f"{name}_us": 1e6 * float(np.median([p.ours for p in pairs])),
            "plain_us": 1e6 * float(np.median([p.theirs for p in pairs])),
        }
    return figures, row


def _seconds(call: Callable[[], object]) -> float:
    """Return the least of a few calls: what it takes when nothing else runs."""
    found = []
    for _ in range(5):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def measure(options: Options) -> Report:
    """Measure every part, or those asked for."""
    wanted = options.only or PARTS
    figures: list[Figure] = []
    rows: list[Row] = []
    stages = Stages("eviction_speed")
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        if "observe" in wanted:
            figures, row = observe(options)
            rows = [row]
            stages.done("observe")
        needed = {"decode", "bytes"} & set(wanted)
        shares = demo_shares(options) if needed else np.ones(0, np.float32)
        if needed:
            stages.done("what the demo model's heads keep")
        if "decode" in wanted:
            figure, row = decode(folder, shares, options, stages)
            figures, rows = [*figures, figure], [*rows, row]
            gc.collect()  # engines are circles, and the next part needs their memory
        if "bytes" in wanted:
            more, counted = bytes_of(folder, shares, options, stages)
            figures, rows = [*figures, *more], [*rows, *counted]
    params: dict[str, Cell] = {"threads": options.threads, "quick": options.quick, "kept": KEPT}
    return Report("eviction_speed", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("eviction_speed", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
