"""What a thief of pages finds of layer 0: rows as stored, turned and coded as the engine does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.engine.build import codec_of
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.shields import shield_of
from kvkeep.errors import ConfigError
from kvkeep.inspect.watch import run_prompt
from kvkeep.quant.codec import Place
from kvkeep.types import PAGE_TOKENS


class DumpedRows(NamedTuple):
    """Layer 0's rows of a prompt's whole pages."""

    k: NDArray[np.float32]
    """[n, Hkv, D] what the stored keys stand for, not turned back, as are the values."""
    v: NDArray[np.float32]
    tokens: NDArray[np.int64]
    """[n] what was said."""


def dump_rows(options: EngineOptions, ids: Sequence[int]) -> DumpedRows:
    """Run a prompt and return what its pages hold; raises `ConfigError` where it has none."""
    pages = len(ids) // PAGE_TOKENS
    if not pages:
        raise ConfigError(
            f"text: {len(ids)} tokens make no page of {PAGE_TOKENS}; give a longer text"
        )
    codec = codec_of(options)
    ran = run_prompt(options, codec, shield_of(options), ids)
    coded = codec.page_spec(ran.shape).window_tokens is not None
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for page in range(pages):
        k, v = (rows[0] for rows in ran.attention.page(page))
        if coded:
            place = Place(0, page == 0)
            k, v = codec.decode(codec.encode(k, v, place), ran.shape, place)
        found.append((k.float(), v.float()))
    keys, values = (torch.cat([one[i] for one in found], 1).transpose(0, 1) for i in (0, 1))
    return DumpedRows(keys.numpy(), values.numpy(), np.array(ids[: pages * PAGE_TOKENS], np.int64))


def save(rows: DumpedRows, path: Path) -> None:
    """Write a dump that `kvkeep attack-cache` reads."""
    try:
        np.savez(path, k=rows.k, v=rows.v, tokens=rows.tokens)
    except OSError as error:
        raise ConfigError(f"out: can't write {path}: {error.strerror}") from None
