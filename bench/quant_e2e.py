"""Decoding on coded pages against 16-bit ones, whole steps of two engines that take turns.

Both serve the same random weights; their prompts' pages come from a tier that makes them up, so
that no prefill of 32,768 tokens has to be waited for.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Report, Row, estimate
from bench.made_up import MadeUpPages, kv_shape
from bench.ours import TENANT, Ours, greedy
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.policy import KeepAll
from kvkeep.models import make
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import Layout

OWN: Final = 32
"""Tokens of each prompt that are computed."""
BATCH: Final = 2


class Case(NamedTuple):
    """One figure: the shapes of a model, the tokens of each prompt, the goal."""

    figure: str
    like: str
    prefix: int
    goal: Goal
    memory_bytes: int
    """For 16-bit pages."""


CASES: Final = (
    Case("e2e_decode_long_vs_bf16", "qwen3-0.6b", 32_512, Goal(">=", 1.8), 9 << 30),
    Case("e2e_decode_4k_vs_bf16", "qwen3-0.6b", 4_096, Goal(">=", 1.0), 3 << 30),
    Case("e2e_decode_long_vs_bf16_g7", "qwen2.5-0.5b", 32_512, Goal(">=", 1.15), 3 << 30),
)
QUICK: Final = Case("e2e_decode_4k_vs_bf16", "qwen3-0.6b", 2_048, Goal(">=", 1.0), 2 << 30)


@dataclass(frozen=True, slots=True)
class Side:
    """An engine on pages of one form."""

    ours: Ours

    def start(self, prefix: int) -> None:
        """Set a batch decoding that ends when it is told to."""
        core = self.ours.core
        core.set_tenants({})
        core.set_tenants({TENANT: 1.0})
        for _ in range(BATCH):
            self.ours.submit(self.ours.prompt(prefix + OWN), greedy(4096))
        fresh = 0
        while fresh < BATCH:
            before = core.counters.generated_tokens
            core.step()
            fresh = core.counters.generated_tokens - before
        found = core.counters.cache_hits
        if found < BATCH * prefix:
            raise RuntimeError(f"{found} tokens were made up, not {BATCH * prefix}")

    def step_s(self) -> float:
        """Return the seconds of one decoding step."""
        begun = time.perf_counter()
        self.ours.core.step()
        return time.perf_counter() - begun


def side_of(model: Path, like: str, codec: Codec, memory_bytes: int, threads: int) -> Side:
    """Return a warm engine whose prompts come from nowhere."""
    parts = Parts(
        techniques=Techniques(codec, NoShield(), KeepAll()),
        policy=ShareNothing(),
        tier=MadeUpPages(codec, kv_shape(like)),
    )
    return Side(Ours(model, threads=threads, kv_cache_bytes=memory_bytes, parts=parts))


def measure_case(case: Case, folder: Path, options: Options) -> tuple[Figure, Row]:
    """Measure steps in turn, the order alternating."""
    model = folder / case.like
    if not model.exists():
        make.make(case.like, model, seed=0)
    kinds: tuple[tuple[Codec, int], ...] = (
        (Float(), case.memory_bytes),
        (Hack(Layout.K2V2), case.memory_bytes // 4 + (2 << 30)),
    )
    sides = [side_of(model, case.like, codec, size, options.threads) for codec, size in kinds]
    for side in sides:
        side.start(case.prefix)
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(5 if options.quick else 3 * MIN_PAIRS):
        for at in (0, 1) if turn % 2 else (1, 0):
            took[at].append(sides[at].step_s())
    plain, coded = (np.array(seconds) for seconds in took)
    gain = estimate((plain / coded).tolist())
    row: Row = {
        "figure": case.figure,
        "model": case.like,
        "requests": BATCH,
        "prefix_tokens": case.prefix,
        "bf16_tokens_per_s": BATCH / float(np.median(plain)),
        "k2v2_tokens_per_s": BATCH / float(np.median(coded)),
    }
    return Figure(case.figure, gain, case.goal), row


def measure(options: Options) -> Report:
    """Measure every case, one after the other."""
    found: list[tuple[Figure, Row]] = []
    with TemporaryDirectory() as directory:
        for case in (QUICK,) if options.quick else CASES:
            found.append(measure_case(case, Path(directory), options))
            gc.collect()  # engines are circles, and the next case needs their memory
    params: dict[str, Cell] = {
        "dtype": "bfloat16",
        "threads": options.threads,
        "quick": options.quick,
        "own_tokens": OWN,
    }
    return Report("quant_e2e", params, [f for f, _ in found], [row for _, row in found])


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("quant_e2e", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
