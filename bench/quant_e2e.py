"""Decoding on coded pages against 16-bit ones, whole steps of two engines that take turns.

Both serve the same random weights; their prompts' pages come from a tier that makes them up, so
that no prefill of 32,768 tokens has to be waited for. With `--peer openvino`, one request on `k2v2`
pages takes turns with one in that library's own process, whose keys and values have eight bits. It
computes its prompt, once for each context: of the longer one, what the shorter did not leave in its
cache. A context whose prompt would take longer than `LONGEST_FILL_S` is left out.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np

from bench import harness, peers
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Report, Row, estimate
from bench.made_up import MadeUpPages, kv_shape
from bench.ours import TENANT, Ours, greedy
from kvkeep.cli.console import NOTES
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.errors import ConfigError
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
BESIDE: Final = Case("e2e_vs_{}_u8", "qwen3-0.6b", 32_512, Goal(">=", 1.3), 9 << 30)
CONTEXTS: Final = (4_096, 8_192, 16_384, BESIDE.prefix)
"""Beside a peer."""
OPTIONS: Final = {"openvino": "u8kv"}
"""Of the peers that can be measured beside, what makes them keep eight bits."""
TOKENS: Final = 24
LONGEST_FILL_S: Final = 900.0
QUICK: Final = Case("e2e_decode_4k_vs_bf16", "qwen3-0.6b", 2_048, Goal(">=", 1.0), 2 << 30)


@dataclass(frozen=True, slots=True)
class Side:
    """An engine on pages of one form."""

    ours: Ours

    def start(self, prefix: int, batch: int = BATCH) -> None:
        """Set a batch decoding that ends when it is told to."""
        core = self.ours.core
        core.set_tenants({})
        core.set_tenants({TENANT: 1.0})
        for _ in range(batch):
            self.ours.submit(self.ours.prompt(prefix + OWN), greedy(4096))
        fresh = 0
        while fresh < batch:
            before = core.counters.generated_tokens
            core.step()
            fresh = core.counters.generated_tokens - before
        found = core.counters.cache_hits
        if found < batch * prefix:
            raise RuntimeError(f"{found} tokens were made up, not {batch * prefix}")

    def step_s(self) -> float:
        """Return the seconds of one decoding step."""
        begun = time.perf_counter()
        self.ours.core.step()
        return time.perf_counter() - begun

    def rate(self, tokens: int) -> float:
        """Return the tokens per second of one request over some steps, after a rest."""
        time.sleep(peers.REST_S)
        return tokens / sum(self.step_s() for _ in range(tokens))


def side_of(model: Path, like: str, codec: Codec, memory_bytes: int, threads: int) -> Side:
    """Return a warm engine whose prompts come from nowhere."""
    parts = Parts(
        techniques=Techniques(codec, NoShield(), KeepAll()),
        policy=ShareNothing(),
        tier=MadeUpPages(codec, kv_shape(like)),
    )
    return Side(Ours(model, threads=threads, kv_cache_bytes=memory_bytes, parts=parts))


def model_in(folder: Path, like: str) -> Path:
    """Return random weights of known shapes, made on first use."""
    model = folder / like
    return model if model.exists() else make.make(like, model, seed=0)


def measure_case(case: Case, folder: Path, options: Options) -> tuple[Figure, Row]:
    """Measure steps in turn, the order alternating."""
    model = model_in(folder, case.like)
    kinds: tuple[tuple[Codec, int], ...] = (
        (Float(), case.memory_bytes),
        (Hack(Layout.K2V2), coded_bytes(case)),
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


def coded_bytes(case: Case) -> int:
    """Return the memory of an engine on 2-bit pages."""
    return case.memory_bytes // 4 + (2 << 30)


def feasible(took_s: Sequence[float]) -> bool:
    """Return whether a context twice as long may be filled: its second half takes up to 4 times."""
    return not took_s or 4 * took_s[-1] <= LONGEST_FILL_S


def at_context(
    prefix: int, ours: Callable[[], float], theirs: Callable[[], float], name: str, pairs: int
) -> tuple[Figure, Row]:
    """Return our rate over a peer's in one context."""
    found = harness.interleave(ours, theirs, pairs)
    whole = prefix == BESIDE.prefix
    figure = BESIDE.figure.format(name) + ("" if whole else f"_{prefix // 1024}k")
    gain = harness.ratio(found)
    row: Row = {
        "prefix_tokens": prefix,
        "k2v2_tokens_per_s": float(np.median([p.ours for p in found])),
        "theirs_tokens_per_s": float(np.median([p.theirs for p in found])),
        "over theirs": gain.median,
    }
    return Figure(figure, gain, BESIDE.goal if whole else None), row


def beside(peer: str, folder: Path, options: Options) -> list[tuple[Figure, Row]]:
    """Return what one request decodes on 2-bit pages beside a peer with eight bits."""
    if peer not in OPTIONS:
        raise ConfigError(f"peer: {peer!r} has no eight-bit cache; choose {', '.join(OPTIONS)}")
    model = model_in(folder, BESIDE.like)
    side = side_of(model, BESIDE.like, Hack(Layout.K2V2), coded_bytes(BESIDE), options.threads)
    found: list[tuple[Figure, Row]] = []
    fills: list[float] = []
    python, option = peers.python_of(peer), OPTIONS[peer]
    with peers.runner(peer, python, model, options.threads, option=option) as theirs:
        for prefix in (1_024, 2_048) if options.quick else CONTEXTS:
            if not feasible(fills):
                NOTES.print(f"{peer}: {prefix} tokens would take too long to fill: left out")
                break
            asked: dict[str, int | str] = {"run": "fanout", "batch": 1, "prefix": prefix}
            their_rate = partial(_rate, theirs, asked | {"prompt": OWN, "tokens": TOKENS})
            begun = time.perf_counter()
            their_rate()
            fills.append(time.perf_counter() - begun)
            side.start(prefix, 1)
            figure, row = at_context(
                prefix,
                partial(side.rate, TOKENS - 1),
                their_rate,
                peer,
                3 if options.quick else MIN_PAIRS,
            )
            name = f"{peer} {theirs.ready['version']}"
            found.append((figure, {"peer": name, **row, "their_fill_s": sum(fills)}))
    return found


def _rate(theirs: peers.Runner, asked: dict[str, int | str]) -> float:
    return float(theirs.measure(asked)["tokens_per_s"])


def measure(options: Options) -> Report:
    """Measure every case, one after the other, or beside every peer asked for."""
    found: list[tuple[Figure, Row]] = []
    with TemporaryDirectory() as directory:
        for peer in options.peers:
            found += beside(peer, Path(directory), options)
        for case in () if options.peers else (QUICK,) if options.quick else CASES:
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
