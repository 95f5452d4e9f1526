"""How near the linear layer is to the machine: GB/s of weights at few rows, GFLOP/s at many.

Every shape cycles through as many copies as it takes to leave none in cache; a figure is the best
call, since others share the machine, beside the best read of as many bytes in the same run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from bench.harness import Options, Report, Row, run
from kvkeep.ops.cpu import ReadBandwidth, available, cpu_ops
from kvkeep.ops.layout import LeafOps, PackedWeight


class Shape(NamedTuple):
    """One weight of a Qwen2.5-0.5B: [outputs, inputs]."""

    name: str
    outputs: int
    inputs: int


SHAPES: Final = (
    Shape("qkv", 1152, 896),
    Shape("o", 896, 896),
    Shape("gate_up", 9728, 896),
    Shape("down", 896, 4864),
    Shape("lm_head", 151_936, 896),
)
LAYER: Final = SHAPES[:4]
ROWS: Final = (1, 2, 4, 8, 16, 64, 1024)
HEAD_ROWS: Final = 8
COLD_BYTES: Final = 96 << 20


class Timed(NamedTuple):
    """Best seconds of one call, and what it moves and computes."""

    seconds: float
    nbytes: int
    flop: float


def copies(leaf: LeafOps, shape: Shape, *, int8: bool) -> list[PackedWeight]:
    """Return as many packed copies as keep any one from staying in cache."""
    weight = torch.randn(shape.outputs, shape.inputs).bfloat16()
    first = leaf.pack(weight, int8=int8)
    count = max(1, -(-COLD_BYTES // first.nbytes))
    return [first, *(leaf.pack(weight, int8=int8) for _ in range(count - 1))]


def best_call(leaf: LeafOps, weights: list[PackedWeight], rows: int, seconds: float) -> Timed:
    """Return the best of at least one round of calls."""
    outputs, inputs = weights[0].shape
    x = torch.randn(rows, inputs).bfloat16()
    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        for weight in weights:
            begin = time.perf_counter()
            leaf.linear(x, weight, None)
            best = min(best, time.perf_counter() - begin)
            if time.perf_counter() > end:
                break
    return Timed(best, weights[0].nbytes, 2.0 * rows * outputs * inputs)


def line(name: str, rows: int, calls: Sequence[Timed], read_gb_s: float) -> Row:
    """Return one row of the report; several calls add up."""
    seconds = sum(call.seconds for call in calls)
    gb_s = sum(call.nbytes for call in calls) / seconds / 1e9
    return {
        "weights": name,
        "rows": rows,
        "us": seconds * 1e6,
        "GB/s": gb_s,
        "of read": gb_s / read_gb_s,
        "GFLOP/s": sum(call.flop for call in calls) / seconds / 1e9,
    }


def measure(options: Options) -> Report:
    """Measure every shape and number of rows, reading memory in between."""
    path = available()[0]
    leaf = cpu_ops(path, options.threads).leaf
    reader = ReadBandwidth(options.threads)
    seconds = 0.15 if options.quick else 1.0
    table: list[Row] = []
    read = max(reader.best_gb_s() for _ in range(10))
    for int8 in (False, True):
        kind = "int8" if int8 else "bf16"
        found: dict[tuple[str, int], Timed] = {}
        for shape in SHAPES:
            weights = copies(leaf, shape, int8=int8)
            for rows in ROWS:
                if shape in LAYER or rows <= HEAD_ROWS:
                    read = max(read, reader.best_gb_s())
                    found[shape.name, rows] = best_call(leaf, weights, rows, seconds)
        for rows in ROWS:
            alone = [shape.name for shape in SHAPES if (shape.name, rows) in found]
            table += [line(f"{kind} {name}", rows, [found[name, rows]], read) for name in alone]
            layer = [found[shape.name, rows] for shape in LAYER]
            table.append(line(f"{kind} layer", rows, layer, read))
    params = {"path": path, "threads": options.threads, "read_gb_s": read}
    return Report("kernels_linear", params, (), table)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("kernels_linear", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
