"""From a few likely guesses to the secret map, and from the map to all rows.

A transform is the same for all rows of a head. So rows that a fingerprint names with little doubt
are known text, from which the map follows; rows it puts in their place become known in turn.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import numpy as np

from kvkeep.audit.stolen.nearest import Guesses, nearest
from kvkeep.audit.stolen.public import FloatArray, PublicModel
from kvkeep.audit.stolen.rows import Stolen

_ROUNDS: Final = 6
_ROWS_PER_CHANNEL: Final = 4
_SURE: Final = (0.25, 0.5, 0.75)
"""Share of the rows, those of least doubt, that a map is solved from, round by round."""


class Maps(Enum):
    """What maps are looked for."""

    ROTATIONS = "rotations"
    ROTATIONS_AND_SHIFTS = "rotations and shifts"
    ANY = "any linear map and shift"


def refined(first: Guesses, stolen: Stolen, public: PublicModel, maps: Maps) -> Guesses:
    """Return the guesses after solving for the map; the first ones where it explains no more.

    A map is solved from a quarter of the rows at first: fewer than D of them fit any.
    """
    if len(stolen) < _ROWS_PER_CHANNEL * public.head_dim:
        return first
    best, table = first, public.values.reshape(public.vocab_size, -1)
    found = first
    for turn in range(_ROUNDS):
        share = _SURE[min(turn, len(_SURE) - 1)]
        sure = found.doubt.argsort()[: max(1, int(share * len(stolen)))]
        theirs, ours = stolen.values[sure], public.values[found.tokens[sure]]
        undone = solved(maps, theirs, ours, stolen.values)
        before, found = found, nearest(undone.reshape(len(stolen), -1), table)
        if found.doubt.mean() < best.doubt.mean():
            best = found
        if np.array_equal(found.tokens, before.tokens):
            break
    return best


def solved(maps: Maps, theirs: FloatArray, ours: FloatArray, rows: FloatArray) -> FloatArray:
    """Return rows [n, Hkv, D] after the map, head by head, that best takes theirs to ours."""
    undone = np.empty_like(rows)
    for head in range(rows.shape[1]):
        x, y = theirs[:, head].astype(np.float64), ours[:, head].astype(np.float64)
        shifted = maps is not Maps.ROTATIONS
        from_x, to_y = (x.mean(0), y.mean(0)) if shifted else (np.zeros(1), np.zeros(1))
        x, y = x - from_x, y - to_y
        if maps is Maps.ANY:
            back = np.linalg.lstsq(x, y, rcond=1e-6)[0]
        else:
            left, _, right = np.linalg.svd(x.T @ y)
            back = left @ right
        undone[:, head] = (rows[:, head] - from_x) @ back + to_y
    return undone
