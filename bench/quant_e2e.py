"""Decoding on coded pages against 16-bit ones, whole steps of two engines that take turns.

Both serve the same random weights; their prompts' pages come from a tier that makes them up, so
that no prefill of 32,768 tokens has to be waited for.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np
import torch

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Report, Row, estimate
from bench.ours import TENANT, Ours, greedy
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.policy import KeepAll
from kvkeep.models import make
from kvkeep.models.shapes import LIKE
from kvkeep.quant.codec import Codec, Float, KVShape
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, Layout

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


class MadeUpPages:
    """A tier that holds every page: normal numbers, the same few tiles over and over."""

    def __init__(self, codec: Codec, shape: KVShape) -> None:
        draw = torch.Generator().manual_seed(0)
        size = (shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
        k, v = (torch.randn(size, generator=draw).bfloat16() for _ in range(2))
        self._first, self._other = (
            codec.encode(k, v, first=first).tobytes() for first in (True, False)
        )
        self._layers = shape.num_layers
        self._starts: set[bytes] = set()
        self._asked = False

    def holds(self, chain_hash: bytes) -> bool:
        """Return True; what is asked for first after a poll starts a sequence."""
        if not self._asked:
            self._starts.add(chain_hash)
        self._asked = True
        return True

    def fetch(
        self,
        chain_hash: bytes,
        install: Callable[[int, bytes], None],
        done: Callable[[bool], None],
    ) -> None:
        """Install all layers at once."""
        for layer in range(self._layers):
            install(layer, self._first if chain_hash in self._starts else self._other)
        done(True)

    def store(self, chain_hash: bytes, read: Callable[[int], bytes]) -> None:
        """Let it go."""

    def poll(self) -> None:
        """Nothing is ever due."""
        self._asked = False


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
    fields = LIKE[like]
    q, kv = fields["num_attention_heads"], fields["num_key_value_heads"]
    dim = fields.get("head_dim") or fields["hidden_size"] // q
    shape = KVShape(fields["num_hidden_layers"], kv, dim, Layout.BF16)
    parts = Parts(
        techniques=Techniques(codec, NoShield(), KeepAll()),
        policy=ShareNothing(),
        tier=MadeUpPages(codec, shape),
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
