"""What it costs to open tiles at use: decoding steps beside those of an engine without a shield.

Both engines are in this process, so memory is overwritten as it is freed in the steps of `tile`
alone; an engine in a process of its own overwrites what Python frees in small pieces too.
"""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from bench import harness
from bench.harness import Figure, Options, Row
from bench.ours import Ours
from bench.shield_transforms import LIKE, STEPS, least, steps_of
from kvkeep.engine.options import KvName
from kvkeep.models import make
from kvkeep.shield.secret import overwrite_freed
from kvkeep.shield.tiles import TileCipher, TileKeys

FORMS: Final[tuple[KvName, ...]] = ("bf16", "k2v2")
CASES: Final = ((1, 1024), (1, 4096), (8, 1024))
"""Requests at a time, and tokens of each. The quick run takes the first."""
TILE_BYTES: Final = (2 << 10, 16 << 10, 64 << 10)
"""About a tile of two bits and one of bfloat16 at 64 channels, and the largest."""
TILES: Final = 64


def figures(options: Options) -> tuple[list[Figure], list[Row]]:
    """Measure decoding; a form's figure is the worst of its batches and contexts."""
    found, rows = [], []
    for kv in FORMS:
        over, own = decode(kv, options)
        found.append(Figure(f"tile_decode_overhead_{kv}", over, None))
        rows += own
    return found, [*rows, *(per_tile(size) for size in TILE_BYTES)]


def decode(kv: KvName, options: Options) -> tuple[harness.Estimate, list[Row]]:
    """Take decoding steps of two engines in turn."""
    rows: list[Row] = []
    worst: harness.Estimate | None = None
    with TemporaryDirectory() as folder:
        layers = 6 if options.quick else None
        model = make.make(LIKE, Path(folder) / LIKE, seed=0, layers=layers)
        side = partial(Ours, model, threads=options.threads, kv_cache_bytes=1 << 30, kv=kv)
        sides = [side(shield="off", max_num_seqs=16), side(shield="tile", max_num_seqs=16)]
        for batch, context in CASES[: 1 if options.quick else None]:
            plain, tile = steps_of(
                sides,
                batch,
                20 if options.quick else STEPS,
                context,
                lambda at: overwrite_freed(wanted=at == 1),
            )
            over = harness.estimate((tile / plain - 1).tolist())
            rows.append(
                {
                    "mode": "tile",
                    "kv": kv,
                    "model": LIKE,
                    "requests": batch,
                    "context_tokens": context,
                    "plain_ms": 1e3 * float(np.median(plain)),
                    "tile_ms": 1e3 * float(np.median(tile)),
                    "overhead": over.median,
                }
            )
            if worst is None or over.median > worst.median:
                worst = over
        del sides
        gc.collect()
    overwrite_freed(wanted=False)
    assert worst is not None
    return worst, rows


def per_tile(size: int) -> Row:
    """Return what one tile costs to seal and to open, many at a time."""
    cipher, numbers = TileCipher(TileKeys()), np.arange(TILES, dtype=np.int32)
    tiles, tags = np.zeros((TILES, size), np.uint8), np.zeros((TILES, 16), np.uint8)
    rows, into = [tile.data for tile in tiles], [bytearray(size) for _ in range(TILES)]
    views = [memoryview(one) for one in into]
    counts = np.zeros(TILES, np.uint64)

    def seal() -> None:
        counts[:] = cipher.seal(rows, tiles, tags, numbers)

    def unseal() -> None:
        assert not cipher.open(tiles, tags, counts, numbers, views)

    return {
        "mode": "tile",
        "tile_bytes": size,
        "seal_us": 1e6 * least(seal, 30) / TILES,
        "open_us": 1e6 * least(unseal, 30) / TILES,
    }
