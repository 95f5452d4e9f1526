"""How many long requests decode at a time in a pool of a fixed size, technique upon technique.

Each request has a prompt of its own, of which the first half is the same for all. One after the
other is submitted and decodes with those before it until the next one finds no room; who is left
goes on for some steps, and the count is of those that never stopped. Who has room is decided by
the engine's scheduler and its pool of pages, of the size named, with the recent tokens beside coded
ones in it. Made up are prompts' pages, which come from a tier, but for the last tokens of each;
which tokens are kept, which is prescribed (`bench/prescribed.py`); and the model around its keys
and values: layers, heads and their size are those of the model named, all else is small. So these
are counts of memory, not of quality or speed. An engine is started for about as many requests as
its pages then hold: recent tokens of each take memory from the coded ones. `--only` measures one
case. Cases that ended are kept in `build/capacity`, by commit.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Report, Stages
from bench.kept import BUILD, Kept
from bench.made_up import MadeUpPages, kv_shape
from bench.ours import Ours, Weights, greedy
from bench.prescribed import KEPT, OWN, Prescribed, demo_shares
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sizing import divide
from kvkeep.errors import ConfigError
from kvkeep.eviction.policy import Evictor, KeepAll
from kvkeep.models import make
from kvkeep.models.shapes import LIKE as SHAPES
from kvkeep.ops.layout import float_tile_bytes
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, FloatArray, Layout

LIKE: Final = "qwen3-0.6b"
BODY: Final = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 50_304}
"""What of the model is small, for it decides nothing here."""
FOLDER: Final = BUILD / "capacity"
MOST_SEQS: Final = 128
SAID_EVERY: Final = 8
"""Requests, after which progress is told."""
GROWN: Final = 2
"""Pages by which a request has grown, about, when the last one comes."""
PATIENCE: Final = 12
"""Steps within which a request that has room decodes."""
WAITS: Final = 4
"""Steps after which one that still waits has none."""


Said = Callable[[str], None]
Rows = dict[str, Cell]


class Size(NamedTuple):
    """How large pool and prompts are, and how many steps all must go on for."""

    pool_bytes: int
    tokens: int
    steps: int


FULL: Final = Size(4 << 30, 8_192, PAGE_TOKENS)
QUICK: Final = Size(512 << 20, 2_048, 4)


class Case(NamedTuple):
    """One bar: what an engine does."""

    name: str
    codec: Codec
    shared: bool
    evicts: bool


CASES: Final = (
    Case("bf16", Float(), False, False),
    Case("+ sharing", Float(), True, False),
    Case("+ k2v2", Hack(Layout.K2V2), True, False),
    Case("+ corm", Hack(Layout.K2V2), True, True),
    Case("bf16 + corm", Float(), False, True),
    Case("k4v2 + corm", Hack(Layout.K4V2), True, True),
)


class Held(NamedTuple):
    """How many requests ran to the end, the pages they held then, and the most ever held."""

    requests: int
    pages: int
    most_pages: int


def pages_for(case: Case, requests: int, tokens: int) -> int:
    """Return about how many pages so many requests need, one of them with its prompt whole."""
    whole = -(-tokens // PAGE_TOKENS) + 1
    shared = whole // 2 if case.shared else 0
    if case.evicts:
        return int(requests * (KEPT * whole + GROWN)) + whole
    return shared + requests * (whole - shared + GROWN)


def started_for(case: Case, size: Size) -> int:
    """Return for how many requests an engine is started: about as many as its pages then hold."""
    shape = kv_shape(LIKE)
    spec, tile = case.codec.page_spec(shape), float_tile_bytes(shape.layout, shape.head_dim)
    if spec.window_tokens is None:
        return MOST_SEQS
    for count in range(2, MOST_SEQS + 1):
        options = EngineOptions(
            model=LIKE,
            max_num_seqs=count,
            max_num_batched_tokens=1024,
            kv_cache_bytes=size.pool_bytes,
        )
        try:
            there = divide(spec, tile, size.pool_bytes, options, sys.maxsize).num_pages
        except ConfigError:  # recent tokens alone are more
            return count
        if pages_for(case, count, size.tokens) > there:
            return count
    return MOST_SEQS


class Filling:
    """One engine whose pool is being filled."""

    def __init__(self, ours: Ours, case: Case, tokens: int) -> None:
        self._ours = ours
        self._case = case
        self._tokens = tokens
        self._start = ours.prompt(tokens // 2)
        self.most_pages = 0

    def held(self) -> int:
        """Return the pages that sequences hold."""
        (use,) = self._ours.core.stats().tenants
        return use.used_pages - use.unused_pages

    def step(self) -> int:
        """Step; return to how many requests that gave a token."""
        counters = self._ours.core.counters
        before = counters.generated_tokens
        self._ours.core.step()
        self.most_pages = max(self.most_pages, self.held())
        return counters.generated_tokens - before

    def joined(self, running: int) -> bool:
        """Submit one more; tell whether it decodes with all of those that ran before."""
        ours, core = self._ours, self._ours.core
        rest = ours.prompt(self._tokens - len(self._start))
        scope = "all" if self._case.shared else None
        ours.submit((*self._start, *rest), greedy(10**5), scope=scope)
        for step in range(PATIENCE):
            served, stats = self.step(), core.stats()
            if stats.preemptions_total or (step >= WAITS and stats.requests_waiting):
                return False
            if served == running + 1:
                return True
        return False

    def filled(self, most: int, steps: int, said: Said) -> Held:
        """Submit requests until one finds no room, then let all others go on."""
        core, count = self._ours.core, 0
        while count < most and self.joined(count):
            count += 1
            if count % SAID_EVERY == 0:
                said(f"{self._case.name}: {count} requests decode")
        said(f"{self._case.name}: no room beside {count} requests, or not started for more")
        for name in range(count + 1, most + 1):
            core.cancel(str(name))
        count = min(count, core.stats().requests_running)
        for _ in range(steps):
            count = min(count, self.step())
        return Held(count, self.held(), self.most_pages)


def model_in(folder: Path) -> Path:
    """Return random weights whose keys and values have known shapes; the rest of it is small."""
    model = folder / LIKE
    return make.tiny("qwen3", model, dtype="bfloat16", overrides={**SHAPES[LIKE], **BODY})


def measure_case(
    case: Case,
    model: Path,
    weights: Weights,
    shares: FloatArray,
    threads: int,
    size: Size,
    said: Said,
) -> Rows:
    """Fill a pool of the size and return what it held."""
    evictor: Evictor = Prescribed(shares) if case.evicts else KeepAll()
    parts = Parts(
        techniques=Techniques(case.codec, NoShield(), evictor),
        policy=ShareNothing(),
        tier=MadeUpPages(case.codec, kv_shape(LIKE)),
        backend=weights.backend,
        model=weights.model,
    )
    seqs = started_for(case, size)
    ours = Ours(
        model, threads=threads, kv_cache_bytes=size.pool_bytes, max_num_seqs=seqs, parts=parts
    )
    info = ours.core.info
    found = Filling(ours, case, size.tokens).filled(seqs, size.steps, said)
    return {
        "case": case.name,
        "requests": found.requests,
        "started_for": seqs,
        "tokens": size.tokens,
        "steps": size.steps,
        "pool_bytes": size.pool_bytes,
        "recent_bytes": info.staged_bytes,
        "pages": info.num_pages,
        "held_pages": found.pages,
        "most_held_pages": found.most_pages,
        "page_bytes": info.bytes_per_token * PAGE_TOKENS,
    }


def chosen(options: Options) -> list[Case]:
    """Return the cases to measure; raises `ConfigError` for one that there is not."""
    known = {file_name(case.name): case for case in CASES}
    for name in options.only:
        if name not in known:
            raise ConfigError(f"only: there is no case {name!r}; there are: {', '.join(known)}")
    return [case for name, case in known.items() if not options.only or name in options.only]


def figures_of(rows: Sequence[Rows]) -> list[Figure]:
    """Return how many requests each case held, and the goal's where both of its cases are there."""
    held = {file_name(str(row["case"])): float(str(row["requests"])) for row in rows}
    found = [
        Figure(f"requests_{name}", harness.exactly(count, MIN_PAIRS))
        for name, count in held.items()
    ]
    if {"bf16", "bf16_corm"} <= held.keys():
        gain = harness.exactly(held["bf16_corm"] / max(held["bf16"], 1), MIN_PAIRS)
        found.insert(0, Figure("concurrency_vs_keepall", gain, Goal(">=", 3.0)))
    return found


def measure(options: Options) -> Report:
    """Fill one pool after the other, but for those that are kept."""
    cases = chosen(options)
    stages, size = Stages("capacity"), QUICK if options.quick else FULL
    kept = Kept(Rows, FOLDER / ("quick" if options.quick else "full"))
    shares = demo_shares(options)
    gc.collect()
    stages.done("what the demo model's heads keep")
    rows: list[Rows] = []
    with TemporaryDirectory() as directory:
        model = model_in(Path(directory))
        weights = Weights.of(model, options.threads)
        stages.done("weights")
        for case in cases:
            filled = partial(
                measure_case, case, model, weights, shares, options.threads, size, stages.done
            )
            rows.append(kept.got(file_name(case.name), filled))
            stages.done(f"{case.name}: {rows[-1]['requests']} requests")
            gc.collect()  # engines are circles, and the next case needs their memory
    params: dict[str, Cell] = {
        "keys_and_values_like": LIKE,
        "made_up": "prompts' pages but the last tokens', what is kept, the rest of the model",
        "who_has_room": "the engine's scheduler",
        "threads": options.threads,
        "quick": options.quick,
        "kept": KEPT,
        "own_tokens": OWN,
        "kept_by_head": " ".join(f"{share:.2f}" for share in np.sort(shares)),
    }
    return Report("capacity", params, figures_of(rows), rows)


def file_name(case: str) -> str:
    """Return a case's name in letters and lines."""
    return case.replace("+", "").replace("  ", " ").strip().replace(" ", "_")


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("capacity", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
