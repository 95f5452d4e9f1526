"""The part `ways` of `kvkeep bench disagg`: how a decode worker gets at a prompt's pages.

They come over loopback sockets, or through shared memory, or they stay where they were computed and
are attended to there. Links are as fast as this machine's, prompts are sent once they are whole so
that all of the way is seen, and requests come one at a time, each way's in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import msgspec
import numpy as np

from bench.disagg_forms import LIKE
from bench.disagg_load import Played
from bench.disagg_workers import (
    LAYERS,
    PATIENCE_S,
    SILENCE_S,
    Workers,
    answered,
    asked,
    engine_options,
    served,
)
from bench.harness import MIN_PAIRS, Figure, Pair, Row, ratio
from kvkeep.disagg.handover import SplitClient
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.worker import spawn_worker
from kvkeep.models import make
from kvkeep.sim.cluster import PHASES
from kvkeep.types import PAGE_TOKENS

TCP: Final = "tcp"
MEMORY: Final = "shared memory"
APART: Final = "attended apart"
WAYS: Final = (TCP, MEMORY, APART)
ANSWER_TOKENS: Final = 32
POOL_BYTES: Final = 512 << 20


class Size(NamedTuple):
    """How much is asked."""

    prompt_tokens: int
    turns: int
    layers: int


FULL: Final = Size(512, MIN_PAIRS + 2, LAYERS)
QUICK: Final = Size(256, 2, 4)


def link_of(way: str, folder: Path) -> LinkOptions:
    """Return how a way's workers are linked; `folder` is one for sockets."""
    link = LinkOptions(unasked_s=PATIENCE_S, silence_s=SILENCE_S)
    if way == MEMORY:
        return msgspec.structs.replace(link, listen=f"shm://{folder}/")
    return msgspec.structs.replace(link, attend_apart=1 if way == APART else None)


def start(way: str, model: Path, folder: Path, threads: int, layers: int) -> Workers:
    """Start a way's two workers; half of the threads each."""
    options = engine_options(model, "bf16", max(1, threads // 2), layers)
    options = msgspec.structs.replace(options, kv_cache_bytes=POOL_BYTES)
    link = link_of(way, folder)
    prefill, decode = (spawn_worker(role, options, link) for role in ("prefill", "decode"))
    client = SplitClient(
        prefill, decode, least_tokens=PAGE_TOKENS, patience_s=PATIENCE_S, whole=way != APART
    )
    return Workers(decode, prefill, {True: client})


async def play(size: Size, model: Path, threads: int) -> dict[str, list[Played]]:
    """Return each way's requests; the first ones, which warm up, left out."""
    found: dict[str, list[Played]] = {way: [] for way in WAYS}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kvkeep-ways-")))
        every = {way: start(way, model, folder, threads, size.layers) for way in WAYS}
        await stack.enter_async_context(served(*every.values()))
        for turn in range(size.turns + 1):
            for way in WAYS if turn % 2 else reversed(WAYS):
                await every[way].fresh(way.partition(" ")[0])
                request = asked(turn, size.prompt_tokens, ANSWER_TOKENS, every[way].tenant)
                one = await answered(every[way].clients[True], request, 0.0)
                check(way, one)
                if turn:
                    found[way].append(one)
    return found


def check(way: str, one: Played) -> None:
    """Raise `RuntimeError` where pages went another way than they should have."""
    sent = one.received_pages >= one.prompt_tokens // PAGE_TOKENS
    if not one.split or sent is (way == APART):
        raise RuntimeError(f"{way}: {one.received_pages} pages were sent")


def phase_s(one: Played, *names: str) -> float:
    """Return what some of a request's phases took."""
    return sum(one.phases[PHASES.index(name)] for name in names)


def token_s(one: Played) -> float:
    """Return what a token of an answer takes where it is decoded."""
    return phase_s(one, "decode") / (one.answer_tokens - 1)


def figures_of(found: dict[str, list[Played]]) -> list[Figure]:
    """Return how much sooner pages come through memory, and what a token costs without them."""
    ways = zip(found[TCP], found[MEMORY], strict=True)
    moved = [
        Pair(phase_s(a, "transfer", "install"), phase_s(b, "transfer", "install")) for a, b in ways
    ]
    tokens = [Pair(token_s(b), token_s(a)) for a, b in zip(found[TCP], found[APART], strict=True)]
    return [
        Figure("shared_memory_transfer_speedup", ratio(moved)),
        Figure("apart_token_time_ratio", ratio(tokens)),
    ]


def row_of(way: str, played: Sequence[Played]) -> Row:
    """Return a way's medians."""
    moved_s = float(np.median([phase_s(one, "transfer", "install") for one in played]))
    sent = float(np.median([one.received_bytes + one.received_rows_bytes for one in played]))
    return {
        "part": "ways",
        "way": way,
        "requests": len(played),
        "prompt_tokens": played[0].prompt_tokens,
        "mbytes": sent / 1e6,
        "moved_ms": 1e3 * moved_s,
        "mbytes_per_s": sent / moved_s / 1e6 if moved_s and way != APART else None,
        "token_ms": 1e3 * float(np.median([token_s(one) for one in played])),
    }


def measure_ways(threads: int, *, quick: bool) -> tuple[list[Figure], list[Row]]:
    """Return the figures and a row for each way."""
    size = QUICK if quick else FULL
    with TemporaryDirectory() as folder:
        model = make.make(LIKE, Path(folder) / LIKE, seed=0, layers=size.layers)
        found = asyncio.run(play(size, model, threads))
    return figures_of(found), [row_of(way, found[way]) for way in WAYS]
