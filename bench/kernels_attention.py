"""How near attention is to the machine: prefill in GFLOP/s, decode in GB/s of K and V.

Decode walks through as many layers as it takes to leave no K or V in cache from the round before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from bench.harness import Options, Report, Row, run
from kvkeep.ops.cpu import available, cpu_ops
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import AttentionPlan, LayerKV
from kvkeep.types import PAGE_TOKENS, Layout
from tests.oracles import Heads, World, flat_plan, make_world

SHAPES: Final = (Heads(14, 2, 64), Heads(32, 8, 128), Heads(16, 8, 128))
PREFILLS: Final = (128, 512, 1024, 4096)
CONTEXTS: Final = (128, 512, 2048, 4096, 16384)
COLD_BYTES: Final = 96 << 20
CHUNK: Final = 1024


def filled(heads: Heads, tokens: int, *, cold: bool) -> World:
    """Return a pool with one context of `tokens` tokens in every layer."""
    pages = -(-tokens // PAGE_TOKENS)
    layer_bytes = pages * PAGE_TOKENS * heads.kv * heads.dim * 4
    layers = min(-(-COLD_BYTES // layer_bytes), 512) if cold else 1
    world = make_world(heads, Layout.BF16, pages=pages, layers=layers, layer=0)
    sample = world.tensor(1 << 20).view(-1)
    numbers = world.kv.buffer.view(sample.dtype)
    numbers.copy_(sample.repeat(-(-numbers.numel() // sample.numel()))[: numbers.numel()])
    return world


def layers_of(world: World) -> list[LayerKV]:
    """Return the pool's layers in turn."""
    kv = world.kv
    count = kv.tile_table.shape[1]
    return [
        LayerKV(kv.buffer, kv.tile_table, kv.unit_bytes, i, kv.num_kv_heads, kv.head_dim)
        for i in range(count)
    ]


def best(step: Callable[[], float], seconds: float) -> float:
    """Return the best of at least five figures: others share this machine."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        found.append(step())
    return max(found)


def plan_for(world: World, tokens: int, rows: int) -> AttentionPlan:
    """Return a plan whose last `rows` of `tokens` positions attend to the only context."""
    slots = np.arange(len(world.free), dtype=np.int32)
    return flat_plan(world.layout, [(slots, range(tokens - rows, tokens))])


def prefill(ops: CpuAttention, heads: Heads, tokens: int, seconds: float) -> float:
    """Return GFLOP/s of the last chunk of a prompt of `tokens` tokens."""
    world = filled(heads, tokens, cold=False)
    rows = min(tokens, CHUNK)
    plan, q = plan_for(world, tokens, rows), world.tensor(rows, heads.q, heads.dim)
    seen = sum(range(tokens - rows + 1, tokens + 1))

    def step() -> float:
        start = time.perf_counter()
        ops.attend(q, world.kv, plan)
        return 4e-9 * heads.dim * heads.q * seen / (time.perf_counter() - start)

    return best(step, seconds)


def decode(ops: CpuAttention, heads: Heads, tokens: int, seconds: float) -> tuple[float, float]:
    """Return GB/s of K and V, and microseconds per layer, of one row over a cold context."""
    world = filled(heads, tokens, cold=True)
    plan, q = plan_for(world, tokens, 1), world.tensor(1, heads.q, heads.dim)
    layers = layers_of(world)

    def step() -> float:
        before, start = ops.bytes_read, time.perf_counter()
        for kv in layers:
            ops.attend(q, kv, plan)
        return (ops.bytes_read - before) * 1e-9 / (time.perf_counter() - start)

    speed = best(step, seconds)
    return speed, tokens * heads.kv * heads.dim * 4e-3 / speed


def measure(options: Options) -> Report:
    """Measure every shape, context and thread count on the fastest path."""
    path = available()[0]
    seconds = 0.1 if options.quick else 0.5
    rows: list[Row] = []
    for threads in (1, 2):
        ops = cpu_ops(path, threads).attention
        if not isinstance(ops, CpuAttention):
            raise TypeError("this benchmark measures the native kernels")
        for heads in SHAPES:
            shape = f"{heads.q}/{heads.kv}x{heads.dim}"
            for tokens in PREFILLS[-2:] if options.quick else PREFILLS:
                speed = prefill(ops, heads, tokens, seconds)
                rows.append(
                    {"shape": shape, "threads": threads, "prompt": tokens, "GFLOP/s": speed}
                )
            for tokens in CONTEXTS[::2] if options.quick else CONTEXTS:
                speed, micros = decode(ops, heads, tokens, seconds)
                rows.append(
                    {
                        "shape": shape,
                        "threads": threads,
                        "context": tokens,
                        "GB/s": speed,
                        "us per layer": micros,
                    }
                )
    return Report("kernels_attention", {"path": path, "chunk": CHUNK}, (), rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("kernels_attention", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
