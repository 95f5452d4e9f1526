"""What serving costs: decode, prefill, bandwidth, warm prompts, host work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bench import harness, peers, radix_match
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Report, Row, estimate, ratio
from bench.ours import KernelGuard, Ours, greedy
from bench.transformers_baseline import Baseline
from kvkeep.engine.api import SamplingParams
from kvkeep.models import make
from kvkeep.ops.cpu import ReadBandwidth

LIKE = "qwen2.5-0.5b"
WARM_LENGTHS = (4096 - 31, 4096, 4096 + 31)
SHORT = 32


def versus(
    name: str, goal: float, ours: Callable[[], float], theirs: Callable[[], float], pairs: int
) -> tuple[Figure, dict[str, Cell]]:
    """Return the ratio's figure and a row with both sides' medians."""
    found = harness.interleave(ours, theirs, pairs)
    row: dict[str, Cell] = {
        "task": name,
        "ours_tokens_per_s": float(np.median([p.ours for p in found])),
        "theirs_tokens_per_s": float(np.median([p.theirs for p in found])),
    }
    return Figure(name, ratio(found), Goal(">=", goal)), row


def against_transformers(
    ours: Ours, theirs: Baseline, options: Options
) -> list[tuple[Figure, dict[str, Cell]]]:
    """Return decode at batch 1 and 8 and a 1,024-token prefill over `generate`."""
    pairs = 2 if options.quick else MIN_PAIRS
    tokens = 8 if options.quick else 16
    return [
        versus(
            "decode_b1_vs_transformers",
            3.0,
            lambda: ours.decode_rate(1, 4 * tokens),
            lambda: theirs.decode_rate(1, tokens),
            pairs,
        ),
        versus(
            "decode_b8_vs_transformers",
            2.8,
            lambda: ours.decode_rate(8, 2 * tokens),
            lambda: theirs.decode_rate(8, tokens),
            pairs,
        ),
        versus(
            "prefill_1k_vs_transformers",
            1.35,
            lambda: ours.prefill_rate(1024),
            lambda: theirs.prefill_rate(1024),
            pairs,
        ),
    ]


def bandwidth(ours: Ours, options: Options) -> Figure:
    """Return weight bytes x tokens/s over the read bandwidth measured beside it."""
    pairs = 3 if options.quick else 2 * MIN_PAIRS
    weights = ours.core.weight_bytes
    reader = ReadBandwidth(options.threads)
    found = harness.interleave(
        lambda: weights * ours.decode_rate(1, 24),
        lambda: reader.measure_gb_s() * 1e9,
        pairs,
    )
    return Figure("decode_bandwidth_ratio", ratio(found), Goal(">=", 0.85))


def warm_ttft(ours: Ours, options: Options) -> list[Figure]:
    """Return the first token of wholly cached prompts, in decode steps at that length."""
    figures = []
    for length in WARM_LENGTHS[1:2] if options.quick else WARM_LENGTHS:
        prompt, scope = ours.prompt(length), f"warm-{length}"
        ours.submit(prompt, greedy(2), scope=scope)
        ours.step_seconds()
        samples = []
        for _ in range(3 if options.quick else MIN_PAIRS):
            begun = time.perf_counter()
            ours.submit(prompt, greedy(12), scope=scope)
            ours.core.step()
            first = time.perf_counter() - begun
            samples.append(first / float(np.median(ours.step_seconds())))
        name = "warm_ttft_in_decode_steps" + ("" if length == 4096 else f"_{length}")
        figures.append(Figure(name, estimate(samples), Goal("<=", 2.0)))
    return figures


def host_share(ours: Ours, options: Options) -> Figure:
    """Return what of a step at batch 8 is not the model: planning, sampling, detokenising."""
    params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, ignore_eos=True, seed=1)
    shares = []
    counters = ours.core.counters
    for _ in range(3 if options.quick else MIN_PAIRS):
        for _ in range(8):
            ours.submit(ours.prompt(SHORT), params)
        ours.core.step()
        step, model = counters.step_seconds, counters.model_seconds
        ours.step_seconds()
        took = counters.step_seconds - step
        shares.append((took - (counters.model_seconds - model)) / took)
    return Figure("host_share", estimate(shares), Goal("<=", 0.08))


def measure(options: Options) -> Report:
    """Run everything on random weights of Qwen2.5-0.5B's shapes."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / LIKE
        make.make(LIKE, path, seed=0)
        beside = [peers.compare(peer, path, options) for peer in options.peers]
        ours = Ours(path, threads=options.threads)
        theirs = Baseline(path, threads=options.threads)
    ours.decode_rate(8, 4)
    theirs.seconds(1, SHORT, 2)
    guard = KernelGuard(ours.core)
    compared = against_transformers(ours, theirs, options)
    figures = [figure for figure, _ in compared]
    figures.append(bandwidth(ours, options))
    figures.extend(warm_ttft(ours, options))
    figures.append(host_share(ours, options))
    guard.check()
    figures.append(radix_match.measure(options).figures[0])
    params: dict[str, Cell] = {
        "model": LIKE,
        "dtype": "bfloat16",
        "threads": options.threads,
        "quick": options.quick,
        "kernel": ours.core.info.kernel,
        "baseline": "transformers generate, sdpa, same process",
    }
    rows: list[Row] = [row for _, row in compared]
    for found, lines in beside:
        figures += found
        rows += lines
    return Report("serve", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("serve", arguments, measure)
