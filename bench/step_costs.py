"""What a worker's steps cost: the measurements that `kvkeep simulate` plans with.

Random weights of known shapes. Chunks of a prompt are computed behind contexts that nobody
computes (`bench/made_up.py`), then batches decode on such contexts, on pages of each form.
`python -m tools.fit_costs RESULT` makes of it the file that `--costs` takes.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from bench import harness
from bench.harness import Cell, Options, Report, Row
from bench.made_up import MadeUpPages, kv_shape
from bench.ours import TENANT, Ours, greedy
from bench.quant_e2e import OWN, Side, model_in
from kvkeep.cli.console import NOTES
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.policy import KeepAll
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, Layout

LIKE: Final = "qwen3-0.6b"
CODECS: Final[tuple[Codec, ...]] = (Float(), Hack(Layout.K4V2), Hack(Layout.K2V2))
CHUNKS: Final = (64, 256, 1024)
BEFORE: Final = (0, 1024, 4096)
ROWS: Final = (1, 2, 4, 8)
CONTEXTS: Final = (256, 1024, 4096)
TURNS: Final = 7
MEMORY_BYTES: Final = 6 << 30


def form_of(codec: Codec) -> str:
    """Return what `--kv` calls it."""
    return "bf16" if isinstance(codec, Float) else codec.name


def chunk_rows(side: Side, pages: MadeUpPages, codec: Codec, turns: int) -> Iterator[Row]:
    """Yield what chunks take at the median; a chunk is what one step computes."""
    core = side.ours.core
    for context in BEFORE:
        for tokens in CHUNKS:
            took: dict[int, list[float]] = {}
            for _ in range(turns):
                core.set_tenants({})
                core.set_tenants({TENANT: 1.0})
                pages.only(context // PAGE_TOKENS)
                side.ours.submit(side.ours.prompt(context + tokens), greedy(1))
                found, before = core.counters.cache_hits, core.counters.steps
                seconds = side.ours.step_seconds()[-1]  # pages are made up in earlier ones
                if core.counters.steps - before == 1:
                    took.setdefault(core.counters.cache_hits - found, []).append(seconds)
            if not took:
                raise RuntimeError(f"{tokens} tokens behind {context} were not one step's")
            for held, times in took.items():
                yield {
                    "part": "chunk",
                    "kv": form_of(codec),
                    "tokens": context + tokens - held,
                    "context": held,
                    "turns": len(times),
                    "seconds": float(np.median(times)),
                }


def step_rows(side: Side, pages: MadeUpPages, codec: Codec, turns: int) -> Iterator[Row]:
    """Yield what decode steps take at the median."""
    pages.only(None)
    for context in CONTEXTS:
        for rows in ROWS:
            side.start(context, rows)
            side.step_s()
            yield {
                "part": "step",
                "kv": form_of(codec),
                "rows": rows,
                "context": rows * (context + OWN + 1 + (turns + 1) // 2),
                "turns": turns,
                "seconds": float(np.median([side.step_s() for _ in range(turns)])),
            }


def codec_row(side: Side, codec: Codec) -> Row:
    """Return what a form of pages takes of memory."""
    info = side.ours.core.info
    return {
        "part": "codec",
        "kv": form_of(codec),
        "bytes_per_token": codec.page_spec(kv_shape(LIKE)).bytes_per_token,
        "window_tokens": info.window_tokens or 0,
    }


def measure(options: Options) -> Report:
    """Measure each form of pages, one after the other."""
    turns = 2 if options.quick else TURNS
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        model = model_in(Path(folder), LIKE)
        for codec in CODECS:
            pages = MadeUpPages(codec, kv_shape(LIKE))
            techniques = Techniques(codec, NoShield(), KeepAll())
            parts = Parts(techniques=techniques, policy=ShareNothing(), tier=pages)
            side = Side(
                Ours(model, threads=options.threads, kv_cache_bytes=MEMORY_BYTES, parts=parts)
            )
            rows.append(codec_row(side, codec))
            rows += chunk_rows(side, pages, codec, turns)
            NOTES.print(f"{form_of(codec)}: chunks measured")
            rows += step_rows(side, pages, codec, turns)
            NOTES.print(f"{form_of(codec)}: steps measured")
            del side
            gc.collect()
    params: dict[str, Cell] = {
        "model": LIKE,
        "threads": options.threads,
        "quick": options.quick,
        "page_tokens": PAGE_TOKENS,
    }
    return Report("step_costs", params, [], rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("step_costs", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
