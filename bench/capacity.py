"""How many long requests decode at a time in a pool of a fixed size, technique upon technique.

Each request has a prompt of its own, of which the first half is the same for all. One after the
other is submitted, decodes its first token and goes on; the count is what runs when the next one
finds no room. Prompts' pages come from a tier that makes them up, but for the last few tokens, and
what is kept is prescribed (`bench/prescribed.py`): counts of memory, not of quality or speed.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Estimate, Figure, Goal, Options, Report, Row, Stages
from bench.made_up import MadeUpPages, kv_shape
from bench.ours import Ours, Weights, greedy
from bench.prescribed import KEPT, OWN, Prescribed, demo_shares
from bench.quant_e2e import model_in
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.policy import Evictor, KeepAll
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, FloatArray, Layout

LIKE: Final = "qwen3-0.6b"
TOKENS: Final = 8_192
POOL_BYTES: Final = 4 << 30
QUICK_TOKENS: Final = 2_048
QUICK_BYTES: Final = 1 << 30
PATIENCE: Final = 12
"""Steps after which a request that still waits finds no room."""


class Case(NamedTuple):
    """One bar: what an engine does, and the most sequences it is started for."""

    name: str
    codec: Codec
    shared: bool
    evicts: bool
    seqs: int


CASES: Final = (
    Case("bf16", Float(), False, False, 16),
    Case("+ sharing", Float(), True, False, 16),
    Case("+ k2v2", Hack(Layout.K2V2), True, False, 40),
    Case("+ corm", Hack(Layout.K2V2), True, True, 64),
    Case("bf16 + corm", Float(), False, True, 32),
    Case("k4v2 + corm", Hack(Layout.K4V2), True, True, 56),
)


class Held(NamedTuple):
    """How many requests ran, and the pages they held then and at most."""

    requests: int
    pages: int
    most_pages: int


def filled(ours: Ours, case: Case, tokens: int) -> Held:
    """Submit requests until one finds no room."""
    core = ours.core
    start = ours.prompt(tokens // 2)
    most = held = 0
    for count in range(case.seqs):
        scope = "all" if case.shared else None
        ours.submit((*start, *ours.prompt(tokens - len(start))), greedy(10**5), scope=scope)
        runs = False
        for _ in range(PATIENCE):
            core.step()
            most = max(most, _held(ours))
            runs = core.stats().requests_waiting == 0 and _decodes(ours, count + 1)
            if runs:
                break
        if not runs or core.stats().preemptions_total:
            return Held(count, held, most)
        held = _held(ours)
    return Held(case.seqs, held, most)


def _held(ours: Ours) -> int:
    """Return the pages that sequences hold."""
    (use,) = ours.core.stats().tenants
    return use.used_pages - use.unused_pages


def _decodes(ours: Ours, requests: int) -> bool:
    """Tell whether a step gives every request a token."""
    before = ours.core.counters.generated_tokens
    ours.core.step()
    return ours.core.counters.generated_tokens - before == requests


def measure_case(
    case: Case, model: Path, weights: Weights, shares: FloatArray, options: Options
) -> Row:
    """Fill a pool of the size and return what it held."""
    evictor: Evictor = Prescribed(shares) if case.evicts else KeepAll()
    parts = Parts(
        techniques=Techniques(case.codec, NoShield(), evictor),
        policy=ShareNothing(),
        tier=MadeUpPages(case.codec, kv_shape(LIKE)),
        backend=weights.backend,
        model=weights.model,
    )
    size = QUICK_BYTES if options.quick else POOL_BYTES
    seqs = case.seqs // 3 if options.quick else case.seqs
    ours = Ours(model, threads=options.threads, kv_cache_bytes=size, max_num_seqs=seqs, parts=parts)
    tokens = QUICK_TOKENS if options.quick else TOKENS
    found = filled(ours, case._replace(seqs=seqs), tokens)
    info = ours.core.info
    return {
        "case": case.name,
        "requests": found.requests,
        "started_for": seqs,
        "tokens": tokens,
        "pool_bytes": size,
        "recent_bytes": info.staged_bytes,
        "pages": info.num_pages,
        "held_pages": found.pages,
        "most_held_pages": found.most_pages,
        "page_bytes": info.bytes_per_token * PAGE_TOKENS,
    }


def measure(options: Options) -> Report:
    """Fill one pool after the other."""
    stages = Stages("capacity")
    shares = demo_shares(options)
    gc.collect()
    stages.done("what the demo model's heads keep")
    rows: list[Row] = []
    with TemporaryDirectory() as directory:
        model = model_in(Path(directory), LIKE)
        weights = Weights.of(model, options.threads)
        stages.done("weights")
        for case in CASES:
            rows.append(measure_case(case, model, weights, shares, options))
            stages.done(f"{case.name}: {rows[-1]['requests']} requests")
            gc.collect()  # engines are circles, and the next case needs their memory
    held = {str(row["case"]): float(str(row["requests"])) for row in rows}
    gain = held["bf16 + corm"] / max(held["bf16"], 1)
    figures = [
        Figure("concurrency_vs_keepall", _exactly(gain), Goal(">=", 3.0)),
        *(Figure(f"requests_{_plain(name)}", _exactly(count)) for name, count in held.items()),
    ]
    params: dict[str, Cell] = {
        "like": LIKE,
        "threads": options.threads,
        "quick": options.quick,
        "kept": KEPT,
        "own_tokens": OWN,
        "kept_by_head": " ".join(f"{share:.2f}" for share in np.sort(shares)),
    }
    return Report("capacity", params, figures, rows)


def _exactly(value: float) -> Estimate:
    """Return a count, that has no spread, as an estimate."""
    return Estimate(value, value, value, MIN_PAIRS)


def _plain(name: str) -> str:
    return name.replace("+", "").replace("  ", " ").strip().replace(" ", "_")


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("capacity", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
