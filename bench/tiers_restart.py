"""A process to be killed: serves the demo model with a disk below it, and says what it wrote.

`python -m bench.tiers_restart DIR SEED` prints the tokens it has written, then goes on serving.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from bench.ours import TENANT, greedy
from kvkeep.cache.tier.backroom import SYNC_S
from kvkeep.config import DEMO_MODEL
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.build import build_core
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, KeyOptions
from kvkeep.types import PAGE_TOKENS

PROMPTS: Final = 8
ANSWER: Final = 4


def engine(directory: Path) -> EngineCore:
    """Return an engine over the demo model with a disk below it."""
    options = EngineOptions(
        model=str(DEMO_MODEL),
        threads=1,
        kv_cache_bytes=64 << 20,
        tiers=(f"disk:{directory / 'tier'},256MiB",),
        keys=KeyOptions(store=str(directory / "keys.json")),
    )
    core = build_core(options)
    core.set_tenants({TENANT: 1.0})
    return core


def prompt(seed: int, number: int) -> tuple[int, ...]:
    """Return one of the prompts of a turn."""
    length = 200 + 37 * number
    return tuple(1 + (seed * 7919 + number * 104_729 + i * 31 + i * i) % 250 for i in range(length))


def ask(core: EngineCore, seed: int, number: int) -> tuple[int, tuple[int, ...]]:
    """Return how much of a prompt was found, and its answer."""
    request = GenerateRequest(
        id="r",
        tenant=TENANT,
        scope="kept",
        prompt_ids=prompt(seed, number),
        params=greedy(ANSWER),
    )
    core.submit(request)
    cached = 0
    answer: list[int] = []
    while not core.idle():
        for output in core.step():
            cached = max(cached, output.chunk.cached_tokens)
            answer += output.chunk.token_ids
        if core.stalled:
            time.sleep(core.caches.pause_s(0.002, 0.002))
    return cached, tuple(answer)


def durable(child: subprocess.Popen[str], extra_s: float) -> int:
    """Wait for what a process has written, and a little longer; return the tokens."""
    line = child.stdout.readline() if child.stdout is not None else ""
    if not line.startswith("written "):
        raise RuntimeError("the process to be killed did not start")
    time.sleep(extra_s)
    return int(line.split()[1])


def found_again(directory: Path, seed: int) -> tuple[int, bool]:
    """Return the prompts' tokens found by a new engine, and whether its answers are right."""
    core = engine(directory)
    asked = [ask(core, seed, number) for number in range(PROMPTS)]
    core.close()
    fresh = build_core(EngineOptions(model=str(DEMO_MODEL), threads=1, kv_cache_bytes=64 << 20))
    fresh.set_tenants({TENANT: 1.0})
    right = [ask(fresh, seed, number)[1] for number in range(PROMPTS)]
    fresh.close()
    return sum(cached for cached, _ in asked), [answer for _, answer in asked] == right


def main(directory: str, seed: str) -> None:
    """Serve, wait until all is written, say so, and go on until the end comes."""
    core = engine(Path(directory))
    for number in range(PROMPTS):
        ask(core, int(seed), number)
    while core.caches.pause_s(1.0, 0.0) < 1.0:
        core.step()
    time.sleep(5 * SYNC_S)  # the writing thread has little to do, and then it syncs
    sys.stdout.write(f"written {PAGE_TOKENS * _pages(int(seed))}\n")
    sys.stdout.flush()
    for number in range(PROMPTS, 10_000):
        ask(core, int(seed), number % 50)


def _pages(seed: int) -> int:
    return sum(len(prompt(seed, number)) // PAGE_TOKENS for number in range(PROMPTS))


if __name__ == "__main__":
    main(*sys.argv[1:])
