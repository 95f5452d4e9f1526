"""What the places below memory cost and give: a prompt's first token from disk, stalls, restarts.

`--only ttft`: a prompt of 4,096 tokens whose pages lie on a disk that the system holds nothing of,
beside computing it. `waited_s` is the part of a hit before anything of it was computed. A prompt of
a token more, of the same pages, is beside it: of coded ones it computes a row, not a block.
`--only stall`: the time that steps spend in the tiers' code while a gigabyte of pages is written
beside eight answers. `--only restart`: a process is killed while it serves; what the next one finds
again of what had been written. `--only faults`: answers of a server whose disk fails and changes,
that is killed and started again, beside those of one without tiers; runs of it that ended are kept
by commit in `build/tier-faults`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Pair, Report, Row
from bench.ours import TENANT, greedy
from bench.quant_e2e import model_in
from bench.tiers_faults import KEPT, RUNS, fault_runs
from bench.tiers_restart import durable, found_again
from bench.tiers_side import DISK_BYTES, POOL_BYTES, TOKENS, Side
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import ShieldName
from kvkeep.errors import ConfigError
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.types import PAGE_TOKENS, Layout

LIKE: Final = "qwen2.5-0.5b"
QUICK_TOKENS: Final = 1_024
STALL_BYTES: Final = 1 << 30
QUICK_STALL_BYTES: Final = 64 << 20
DECODING: Final = 8
UNDISTURBED: Final = 50
"""Steps before anything is written."""
KILLS: Final = 10
PARTS: Final = ("ttft", "stall", "restart", "faults")
MODES: Final[tuple[ShieldName, ...]] = ("off", "seal")
CODECS: Final[dict[str, Codec]] = {"bf16": Float(), "k2v2": Hack(Layout.K2V2)}


def measure_ttft(model: Path, codec: str, options: Options) -> tuple[list[Figure], list[Row]]:
    """Measure a hit beside computing, and beside a hit of every other sealer."""
    tokens = QUICK_TOKENS if options.quick else TOKENS
    pairs = 3 if options.quick else MIN_PAIRS
    figures: list[Figure] = []
    rows: list[Row] = []
    with TemporaryDirectory() as directory:
        sides = {
            mode: Side(model, Path(directory), mode, CODECS[codec], options.threads)
            for mode in MODES
        }
        plain = sides["off"]
        prompt = plain.prompt[:tokens]
        for side in sides.values():
            side.first_token_s(prompt, "kept")
        found = harness.interleave(
            lambda: plain.hit_s(prompt),
            lambda: plain.first_token_s(plain.ours.prompt(tokens)),
            pairs,
        )
        figures.append(
            Figure(f"ttft_disk_hit_vs_recompute_{codec}", harness.ratio(found), Goal("<=", 0.03))
        )
        rows.append(_row(codec, "off", tokens, found, plain))
        longer = plain.prompt[: tokens + 1]
        past = harness.interleave(partial(plain.hit_s, longer), partial(plain.hit_s, prompt), pairs)
        rows.append(_row(codec, "off", tokens + 1, past, plain))
        for mode, side in sides.items():
            if mode != "off":
                beside = harness.interleave(
                    partial(side.hit_s, prompt), partial(plain.hit_s, prompt), 2 * pairs
                )
                name = f"ttft_sealed_vs_plain_tier_{codec}"
                figures.append(Figure(name, harness.ratio(beside), Goal("<=", 1.02)))
                rows.append(_row(codec, mode, tokens, beside, side))
        for side in sides.values():
            side.close()
    return figures, rows


def _row(codec: str, mode: str, tokens: int, pairs: Sequence[Pair], side: Side) -> Row:
    waits, side.waits = side.waits, []
    return {
        "kv": codec,
        "shield": mode,
        "tokens": tokens,
        "waited_s": float(np.median(waits)),
        "hit_s": float(np.median([pair.ours for pair in pairs])),
        "other_s": float(np.median([pair.theirs for pair in pairs])),
    }


def measure_stall(model: Path, mode: ShieldName, options: Options) -> tuple[Figure, Row]:
    """Fill the pool with pages nobody computed and decode while they are written."""
    wanted = QUICK_STALL_BYTES if options.quick else STALL_BYTES
    with TemporaryDirectory() as directory:
        side = Side(model, Path(directory), mode, Float(), options.threads)
        for _ in range(DECODING):
            side.ours.submit(side.ours.prompt(64), greedy(4_000))
        for _ in range(20):
            side.core.step()
        before = [_step_ms(side) for _ in range(UNDISTURBED)]
        _rest(side.core, wanted)
        stalls: list[float] = []
        works: list[float] = []
        steps: list[float] = []
        begun = time.perf_counter()
        while side.core.caches.pause_s(1.0, 0.0) < 1.0 and len(stalls) < 10_000:
            side.timed.spent_s = side.timed.worked_s = 0.0
            steps.append(_step_ms(side))
            stalls.append(1e3 * side.timed.spent_s)
            works.append(1e3 * side.timed.worked_s)
        took = time.perf_counter() - begun
        written = side.timed.tier.uses()[-1].used_bytes
        side.close()
    p99 = float(np.percentile(stalls, 99))
    row: Row = {
        "shield": mode,
        "written_bytes": written,
        "steps": len(stalls),
        "seconds": took,
        "stall_ms_p50": float(np.median(stalls)),
        "stall_ms_p99": p99,
        "stall_ms_max": max(stalls),
        "work_ms_p50": float(np.median(works)),
        "work_ms_p99": float(np.percentile(works, 99)),
        "step_ms_p50": float(np.median(steps)),
        "step_ms_p99": float(np.percentile(steps, 99)),
        "undisturbed_step_ms_p50": float(np.median(before)),
    }
    return Figure("engine_stall_ms_p99", harness.exactly(p99, len(stalls)), Goal("<=", 2.0)), row


def _step_ms(side: Side) -> float:
    begun = time.perf_counter()
    side.core.step()
    return 1e3 * (time.perf_counter() - begun)


def _rest(core: EngineCore, wanted: int) -> None:
    """Let views of made-up tokens end, whose pages are then at rest and not written."""
    (manager,) = core.caches.managers.values()
    pages = wanted // manager.pool.spec.page_bytes
    tokens = np.random.default_rng(1).integers(1, 50_000, pages * PAGE_TOKENS, np.int32)
    match = manager.match(tokens, account=TENANT, scope="rest")
    view = manager.open_view(match, len(tokens))
    manager.extend(view, len(tokens))
    manager.commit(view, tokens)
    manager.release(view, tokens)


def measure_restart(options: Options) -> tuple[Figure, list[Row]]:
    """Kill a serving process at several moments and see what the next one finds."""
    ratios: list[float] = []
    rows: list[Row] = []
    for turn in range(3 if options.quick else KILLS):
        with TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "bench.tiers_restart", directory, str(turn)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                written = durable(child, extra_s=0.05 * turn)
            finally:
                child.send_signal(signal.SIGKILL)
                child.wait()
                if child.stdout is not None:
                    child.stdout.close()
            found, right = found_again(Path(directory), turn)
        ratios.append(found / written)
        rows.append(
            {"turn": turn, "written_tokens": written, "found_tokens": found, "answers_right": right}
        )
    return Figure("restart_hit_ratio", harness.estimate(ratios), Goal(">=", 0.99)), rows


def measure_faults(options: Options) -> tuple[Figure, Row]:
    """Count the answers that differ under faults from those of a server without tiers."""
    counted = fault_runs(1 if options.quick else RUNS, KEPT)
    row: Row = {"fault_run": "demo", **counted._asdict()}
    wrong = harness.exactly(counted.wrong, counted.answers)
    return Figure("wrong_tokens_in_fault_runs", wrong, Goal("<=", 0.0)), row


def measure(options: Options) -> Report:
    """Measure the parts asked for."""
    for name in options.only:
        if name not in PARTS:
            raise ConfigError(f"only: there is no part {name!r}; there are: {', '.join(PARTS)}")
    wanted = options.only or PARTS
    figures: list[Figure] = []
    rows: list[Row] = []
    with TemporaryDirectory() as directory:
        if "ttft" in wanted:
            for codec in ("bf16",) if options.quick else CODECS:
                some, more = measure_ttft(model_in(Path(directory), LIKE), codec, options)
                figures, rows = figures + some, rows + more
        if "stall" in wanted:
            figure, row = measure_stall(model_in(Path(directory), LIKE), MODES[-1], options)
            figures, rows = [*figures, figure], [*rows, row]
    if "restart" in wanted:
        figure, more = measure_restart(options)
        figures, rows = [*figures, figure], [*rows, *more]
    if "faults" in wanted:
        figure, row = measure_faults(options)
        figures, rows = [*figures, figure], [*rows, row]
    params: dict[str, Cell] = {
        "like": LIKE,
        "threads": options.threads,
        "quick": options.quick,
        "pool_bytes": POOL_BYTES,
        "disk_bytes": DISK_BYTES,
    }
    return Report("tiers", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("tiers", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
