"""Nearest rows of a table, and how clearly they are the nearest."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvkeep.audit.stolen.public import FloatArray

_CELLS: Final = 1 << 25
"""Distances held at a time."""
_LEAST: Final = 1e-12


class Guesses(NamedTuple):
    """A token for every row."""

    tokens: NDArray[np.int64]
    doubt: FloatArray
    """[n] distance to the nearest over that to the second nearest: 0 is certain, 1 a toss."""


def nearest(rows: FloatArray, table: FloatArray) -> Guesses:
    """Return for each of rows [n, F] the nearest of table [V, F]."""
    squares = np.square(table).sum(1)
    step = max(1, _CELLS // len(table))
    tokens, doubt = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        apart = squares - 2 * (part @ table.T)
        first = apart.argmin(1)
        apart[np.arange(len(part)), first] = np.inf
        pair = np.stack([first, apart.argmin(1)], 1)
        # Sums of large squares lose what tells neighbours apart: both are measured again.
        exact = np.linalg.norm(part[:, None] - table[pair], axis=2)
        order = exact.argsort(1)
        at = slice(begin, begin + len(part))
        tokens[at] = np.take_along_axis(pair, order[:, :1], 1)[:, 0]
        doubt[at] = exact.min(1) / np.maximum(exact.max(1), _LEAST)
    return Guesses(tokens, doubt)


def standardised(rows: FloatArray, table: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return both with every column in the table's standard deviations."""
    scale = np.maximum(table.std(0), np.float32(_LEAST))
    return rows / scale, table / scale
