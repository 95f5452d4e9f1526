"""CacheGen's form with a coder that is fast enough to be played to: many lanes at a time.

Each head's channel has a lane of its own, which codes its symbols token by token with a state of 32
bits (asymmetric numeral systems, words of 16 bits), by the same tables as the range coder of
`kvkeep.quant.baselines.cachegen`; a step of all lanes is a few operations of numpy. What the lanes'
last states take is part of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.quant.baselines.base import KV, Fields, joined
from kvkeep.quant.baselines.cachegen import CacheGen, Coded
from kvkeep.quant.baselines.range_coder import TOTAL_BITS, Table
from kvkeep.quant.codec import KVShape, Place
from kvkeep.types import PAGE_TOKENS

_LOW: Final = 1 << 16
_ROOM_BITS: Final = 32 - TOTAL_BITS
_ANCHOR_EVERY: Final = 10

States = NDArray[np.uint64]
Sums = NDArray[np.int64]
"""[lanes, symbols + 1], running sums of frequencies."""


class Interleaved(CacheGen):
    """The same codes and tables, coded lane by lane."""

    def __init__(self, sample: Sequence[Sequence[KV]]) -> None:
        """`sample`: per layer, pages k, v [N, S, D] to count symbols on."""
        super().__init__(sample)
        self._sums = [tuple(map(_sums, tables)) for tables in self._tables]

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return the scales, the lanes' states and their words."""
        coded = self._code(k, v, place.layer)
        symbols = coded.codes.numpy().astype(np.int64).transpose(2, 0, 1, 3)
        state = np.full(symbols[0].size, _LOW, np.uint64)
        words: list[NDArray[np.uint16]] = []
        for token in reversed(range(PAGE_TOKENS)):
            first, width = _places(self._of(place.layer, token), symbols[token].reshape(2, -1))
            full = state >= width << np.uint64(_ROOM_BITS)
            words.append((state[full] & np.uint64(_LOW - 1)).astype(np.uint16))
            state[full] >>= np.uint64(16)
            high, rest = np.divmod(state, width)
            state = (high << np.uint64(TOTAL_BITS)) + rest + first
        told = [state.astype(np.uint32).tobytes(), *(one.tobytes() for one in reversed(words))]
        return joined([coded.scales]) + b"".join(told)

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return what the codes stand for."""
        heads, dim = shape.num_kv_heads, shape.head_dim
        fields = Fields(blob)
        scales = fields.take(torch.float16, 2, heads, PAGE_TOKENS, 1)
        raw, lanes = fields.rest(), 2 * heads * dim
        state = np.frombuffer(raw, np.uint32, lanes).astype(np.uint64)
        words, at = np.frombuffer(raw, np.uint16, offset=4 * lanes), 0
        symbols = np.empty((PAGE_TOKENS, 2, heads, dim), np.int16)
        for token in range(PAGE_TOKENS):
            slot = state & np.uint64((1 << TOTAL_BITS) - 1)
            sums = self._of(place.layer, token)
            found = _symbols(sums, slot.astype(np.int64).reshape(2, -1))
            symbols[token] = found.reshape(2, heads, dim)
            first, width = _places(sums, found)
            state = width * (state >> np.uint64(TOTAL_BITS)) + slot - first
            low = state < _LOW
            end = at + int(low.sum())
            state[low] = state[low] << np.uint64(16) | words[at:end].astype(np.uint64)
            at = end
        codes = torch.from_numpy(symbols).permute(1, 2, 0, 3)
        return self._values(Coded(scales, codes), place.layer)

    def _of(self, layer: int, token: int) -> tuple[Sums, Sums]:
        """Return a token's sums, of its keys and of its values."""
        anchor, delta, value = self._sums[layer]
        return (delta if token % _ANCHOR_EVERY else anchor), value


def _sums(tables: Sequence[Sequence[Table]]) -> Sums:
    return np.array([table for head in tables for table in head], np.int64)


def _places(sums: tuple[Sums, Sums], symbols: Sums) -> tuple[States, States]:
    """Return where the symbols [2, lanes / 2] begin and how wide they are, [lanes]."""
    rows = np.arange(symbols.shape[1])
    first = np.concatenate([one[rows, s] for one, s in zip(sums, symbols, strict=True)])
    end = np.concatenate([one[rows, s + 1] for one, s in zip(sums, symbols, strict=True)])
    return first.astype(np.uint64), (end - first).astype(np.uint64)


def _symbols(sums: tuple[Sums, Sums], slots: Sums) -> Sums:
    """Return the symbols [2, lanes / 2] in whose places the slots lie."""
    found = [(one[:, 1:] <= s[:, None]).sum(1) for one, s in zip(sums, slots, strict=True)]
    return np.stack(found)
