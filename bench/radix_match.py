"""What the cache's own work costs: matching per page, and a whole warm request of 4,096 tokens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np

from bench.harness import Figure, Goal, Options, Report, Row, estimate, run
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.pool import TilePool
from kvkeep.cache.radix import KEY_BYTES, RadixIndex, token_bytes
from kvkeep.sharing.policy import ShareNothing
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout, PageSpec, PageTag

TOKENS: Final = 4096
PROMPTS: Final = 16
SPEC: Final = PageSpec(Layout.BF16, num_layers=1, num_kv_heads=1, head_dim=64, tile_bytes=16384)
"""One tile per page: what is timed does not touch tiles, but for zeroing fresh pages."""


def micros(work: Callable[[], object]) -> float:
    """Return the microseconds of one call."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def serve(manager: CacheManager, tokens: Int32Array) -> dict[str, float]:
    """Run one request but for its forward pass; return the microseconds of each part."""
    start = time.perf_counter()
    match = manager.match(tokens, account="a", scope="a")
    matched = time.perf_counter()
    view = manager.open_view(match, len(tokens))
    manager.extend(view, len(tokens) - view.length)
    opened = time.perf_counter()
    manager.commit(view, tokens)
    committed = time.perf_counter()
    manager.release(view, tokens)
    ends = (start, matched, opened, committed, time.perf_counter())
    names = ("match us", "open us", "commit us", "release us")
    return {name: (b - a) * 1e6 for name, a, b in zip(names, ends, ends[1:], strict=False)}


def decode_steps(manager: CacheManager, tokens: Int32Array) -> float:
    """Return the microseconds per step of extend and commit for a batch of 8, over one page."""
    views = [manager.open_view(manager.match([i], account="a", scope="a"), 1) for i in range(8)]

    def steps() -> None:
        for length in range(1, PAGE_TOKENS + 1):
            for view in views:
                manager.extend(view, 1)
                manager.commit(view, tokens[:length])

    taken = micros(steps) / PAGE_TOKENS
    for view in views:
        manager.release(view, [])
    return taken


def measure(options: Options) -> Report:
    """Fill the index with prompts that share their first half, then match and serve them."""
    manager = CacheManager(
        TilePool(SPEC, (PROMPTS + 2) * TOKENS // PAGE_TOKENS),
        RadixIndex(b"bench"),
        ShareNothing(),
        PageTag,
    )
    manager.set_quotas({"a": manager.pool.num_pages}, 0)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 150_000, (PROMPTS, TOKENS), dtype=np.int32)
    prompts[:, : TOKENS // 2] = prompts[0, : TOKENS // 2]
    rows: list[Row] = [{"request": "cold", **serve(manager, prompt)} for prompt in prompts[-2:]]
    for prompt in prompts:
        serve(manager, prompt)
    root = manager.index.find_root(manager.index.model_digest, "a", PageTag("a"))
    if root is None:
        raise RuntimeError("nothing was indexed")
    raw = [token_bytes(prompt) for prompt in prompts]
    pages = TOKENS * 4 // KEY_BYTES
    rounds = 20 if options.quick else 200
    per_page, whole, warm, steps = [], [], [], []
    for turn in range(rounds):
        i = turn % PROMPTS
        per_page.append(micros(partial(manager.index.walk, root, raw[i])) / pages)
        match = micros(partial(manager.match, prompts[i], account="a", scope="a"))
        whole.append(match / pages)
        warm.append(sum(serve(manager, prompts[i]).values()) / 1e3)
        steps.append(decode_steps(manager, prompts[i]))
    rows.append({"request": "warm", **serve(manager, prompts[3])})
    figures = (
        Figure("radix_match_us_per_page", estimate(whole), Goal("<=", 1.0)),
        Figure("radix_walk_us_per_page", estimate(per_page)),
        Figure("warm_request_ms", estimate(warm), Goal("<=", 1.0)),
        Figure("decode_step_b8_us", estimate(steps)),
    )
    return Report("radix_match", {"tokens": TOKENS, "prompts": PROMPTS}, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return run("radix_match", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
