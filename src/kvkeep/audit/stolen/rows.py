"""Stolen rows: a dump of layer 0's keys and values, or the raw bytes of pages."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from kvkeep.audit.stolen.public import FloatArray, PublicModel
from kvkeep.errors import AuditError

IntArray = NDArray[np.int64]
Form = Literal["lanes", "rows"]
"""How raw tiles are arranged: as a CPU's kernels read them, or token by token."""

PAGE_TOKENS: Final = 64
_LANES: Final = 16
_LARGEST: Final = 1e6
"""Of a number that a key or a value can be; what is larger, or none, counts as 0."""


@dataclass(frozen=True, slots=True)
class Stolen:
    """Rows of layer 0 as they lay where they were stolen."""

    keys: FloatArray
    """[n, Hkv, D]."""
    values: FloatArray
    """[n, Hkv, D]."""
    tokens: IntArray | None = None
    """[n] what was said, to count what was guessed right and as the text an attacker knows."""
    v_proj: FloatArray | None = None
    """[Hkv * D, hidden] the weights that made the values, where they were stolen too."""
    known: int = 0
    """Leading rows whose tokens the attacker has: a template, or a request of its own."""

    def __len__(self) -> int:
        return len(self.values)


def read_stolen(path: Path, public: PublicModel, form: Form = "lanes") -> Stolen:
    """Read a dump (.npz), the raw bytes of pages, or all such files of a folder in their order.

    Raises `AuditError` where there is nothing to look at.
    """
    if path.is_dir():
        parts = [
            read_stolen(file, public, form) for file in sorted(path.iterdir()) if file.is_file()
        ]
        if not parts:
            raise AuditError(f"{path} holds no files; give a dump or the bytes of pages")
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return Stolen(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate(tokens) if len(tokens) == len(parts) else None,
            parts[0].v_proj,
        )
    try:
        if path.suffix == ".npz":
            return _dump(path, public)
        return rows_of_bytes(path.read_bytes(), public, form)
    except OSError as error:
        raise AuditError(f"can't read {path}: {error.strerror or error}") from None


def _dump(path: Path, public: PublicModel) -> Stolen:
    try:
        with np.load(path, allow_pickle=False) as held:
            keys, values = (held[name].astype(np.float32) for name in ("k", "v"))
            tokens = held["tokens"].astype(np.int64) if "tokens" in held else None
            v_proj = held["v_proj"].astype(np.float32) if "v_proj" in held else None
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise AuditError(f"{path} is no dump with arrays `k` and `v`: {error}") from None
    heads = (public.heads, public.head_dim)
    if keys.shape != values.shape or keys.shape[1:] != heads:
        raise AuditError(f"{path} holds rows {keys.shape}; the model's are [n, {heads}]")
    if tokens is not None and tokens.shape != (len(keys),):
        raise AuditError(f"{path} holds {tokens.shape} tokens for {len(keys)} rows")
    if tokens is not None and not ((tokens >= 0) & (tokens < public.vocab_size)).all():
        raise AuditError(f"{path} holds tokens outside the model's vocabulary")
    return Stolen(_numbers(keys), _numbers(values), tokens, v_proj)


def rows_of_bytes(data: bytes, public: PublicModel, form: Form = "lanes") -> Stolen:
    """Take bytes as pages of the model's dtype, one behind the other, layer 0 first in each.

    Sealed bytes are taken the same way: whoever steals them has no better one.
    """
    size = 4 if public.dtype == "float32" else 2
    heads, dim = public.heads, public.head_dim
    tile = PAGE_TOKENS * dim * size
    page = public.num_layers * heads * 2 * tile
    pages = len(data) // page
    if not pages:
        raise AuditError(f"{len(data)} bytes hold no page of this model, which has {page}")
    raw = np.frombuffer(data, np.uint8, pages * page).reshape(pages, -1)[:, : heads * 2 * tile]
    tiles = np.ascontiguousarray(raw).reshape(pages * heads, 2, tile)
    keys, values = (_values_of(tiles[:, i], dim, size, form, key=not i) for i in (0, 1))
    k, v = (
        x.reshape(pages, heads, PAGE_TOKENS, dim).swapaxes(1, 2).reshape(-1, heads, dim)
        for x in (keys, values)
    )
    return Stolen(_numbers(k), _numbers(v))


def _values_of(
    tiles: NDArray[np.uint8], dim: int, size: int, form: Form, *, key: bool
) -> FloatArray:
    """Return [n, S, D] of half-tiles of bytes."""
    count, pair = len(tiles), 4 // size
    dense = np.ascontiguousarray(tiles)
    if size == 2:
        wide = (dense.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        wide = dense.view("<f4").astype(np.float32)
    if form == "rows":
        return wide.reshape(count, PAGE_TOKENS, dim)
    if key:
        lanes = wide.reshape(count, PAGE_TOKENS // _LANES, dim // pair, _LANES, pair)
        return lanes.transpose(0, 1, 3, 2, 4).reshape(count, PAGE_TOKENS, dim)
    return (
        wide.reshape(count, PAGE_TOKENS // pair, dim, pair)
        .transpose(0, 1, 3, 2)
        .reshape(count, PAGE_TOKENS, dim)
    )


def _numbers(x: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore"):
        found: FloatArray = np.where(np.abs(x) <= _LARGEST, x, np.float32(0))
    return found
