"""A range coder: symbols to bytes and back, each by a frequency table of its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np
from numpy.typing import NDArray

TOTAL_BITS: Final = 14
"""Frequencies of a table add up to 2 ** TOTAL_BITS."""

_WIDTH: Final = 1 << 32
_NARROW: Final = 1 << 24

Table = tuple[int, ...]
"""Running sums of frequencies, from 0 to 2 ** TOTAL_BITS."""


def table_of(counts: NDArray[np.float64]) -> Table:
    """Return the table of symbols counted so often; each can be coded, however rare."""
    total = 1 << TOTAL_BITS
    share = counts / max(float(counts.sum()), 1.0)
    frequency = 1 + np.floor(share * (total - len(counts))).astype(np.int64)
    frequency[int(counts.argmax())] += total - int(frequency.sum())
    return tuple(accumulate(frequency.tolist(), initial=0))


def encode(symbols: Sequence[int], tables: Sequence[Table]) -> bytes:
    """Return the bytes of symbols, each coded by the table at its place."""
    low, width, count = 0, _WIDTH, 4
    for symbol, table in zip(symbols, tables, strict=True):
        step = width >> TOTAL_BITS
        begin = table[symbol]
        low += step * begin
        width = step * (table[symbol + 1] - begin)
        while width < _NARROW:
            low <<= 8
            width <<= 8
            count += 1
    inside = (low >> 16) + 1  # the last 16 bits may be anything: the width is larger
    return inside.to_bytes(count - 2, "big")


def decode(blob: bytes, tables: Sequence[Table]) -> list[int]:
    """Return the symbols of bytes; the inverse of `encode`."""
    code, width, at = int.from_bytes(blob[:4].ljust(4, b"\0"), "big"), _WIDTH, 4
    symbols = []
    for table in tables:
        step = width >> TOTAL_BITS
        symbol = bisect_right(table, min(code // step, table[-1] - 1)) - 1
        symbols.append(symbol)
        code -= step * table[symbol]
        width = step * (table[symbol + 1] - table[symbol])
        while width < _NARROW:
            code = code << 8 | (blob[at] if at < len(blob) else 0)
            width <<= 8
            at += 1
    return symbols
