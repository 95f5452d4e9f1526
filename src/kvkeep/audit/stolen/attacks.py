"""The attacks: each looks at what a class of transforms leaves as it was.

An attack is given rows and the public tables and returns a guess for every row, or None where it
needs what was not stolen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from kvkeep.audit.stolen.nearest import Guesses, nearest, standardised
from kvkeep.audit.stolen.public import FloatArray, PublicModel
from kvkeep.audit.stolen.refine import Maps, refined, solved
from kvkeep.audit.stolen.rows import Stolen

Guess = Callable[[Stolen, PublicModel], Guesses | None]


class Attack(NamedTuple):
    """One attack and what it breaks."""

    name: str
    breaks: str
    guess: Guess


def collision(stolen: Stolen, public: PublicModel) -> Guesses:
    """Compare rows with the vocabulary's own: values as they are, keys but for the rotation."""
    return nearest(
        _joined(stolen.values, _radii(stolen.keys)), _joined(public.values, _radii(public.keys))
    )


def sorted_values(stolen: Stolen, public: PublicModel) -> Guesses:
    """Compare each head's values in order of size: a permutation leaves them."""
    return nearest(_flat(np.sort(stolen.values)), _flat(np.sort(public.values)))


def hadamard_magnitudes(stolen: Stolen, public: PublicModel) -> Guesses | None:
    """Undo one public Hadamard sum and compare sizes: secret signs before it do not count."""
    dim = public.head_dim
    if dim & (dim - 1):
        return None
    sums = np.ones((1, 1), np.float32)
    while len(sums) < dim:
        sums = np.block([[sums, sums], [sums, -sums]])
    back = np.abs(stolen.values @ (sums / np.float32(dim**0.5)))
    return nearest(_flat(back), _flat(np.abs(public.values)))


def pair_radii(stolen: Stolen, public: PublicModel) -> Guesses:
    """Compare the lengths of channel pairs: rotations that go through RoPE leave them."""
    return nearest(
        _joined(_radii(stolen.keys), _radii(stolen.values)),
        _joined(_radii(public.keys), _radii(public.values)),
    )


def norms(stolen: Stolen, public: PublicModel) -> Guesses:
    """Compare each head's lengths, which any rotation leaves; then solve for the rotation."""
    rows, table = _lengths(stolen.keys, stolen.values), _lengths(public.keys, public.values)
    first = nearest(*standardised(rows, table))
    return refined(first, stolen, public, Maps.ROTATIONS)


def centred_norms(stolen: Stolen, public: PublicModel) -> Guesses:
    """Take the mean row off first, which a vector added to all rows is part of."""
    rows = np.linalg.norm(stolen.values - stolen.values.mean(0), axis=-1)
    table = np.linalg.norm(public.values - public.values.mean(0), axis=-1)
    first = nearest(*standardised(rows, table))
    return refined(first, stolen, public, Maps.ROTATIONS_AND_SHIFTS)


def known_distances(stolen: Stolen, public: PublicModel) -> Guesses | None:
    """Compare distances to rows of known tokens: rotations with a secret shift leave them."""
    if not stolen.known or stolen.tokens is None:
        return None
    anchors = range(min(stolen.known, MOST_ANCHORS))
    rows = [np.linalg.norm(stolen.values - stolen.values[i], axis=-1) for i in anchors]
    there = public.values[stolen.tokens[: len(anchors)]]
    table = [np.linalg.norm(public.values - there[i], axis=-1) for i in anchors]
    first = nearest(_joined(*rows), _joined(*table))
    return refined(first, stolen, public, Maps.ROTATIONS_AND_SHIFTS)


def known_text(stolen: Stolen, public: PublicModel) -> Guesses | None:
    """Solve for any linear map and shift by least squares over known rows, and undo it."""
    known = stolen.known
    if known < MOST_ANCHORS or stolen.tokens is None:
        return None
    theirs, ours = stolen.values[:known], public.values[stolen.tokens[:known]]
    undone = solved(Maps.ANY, theirs, ours, stolen.values)
    return nearest(_flat(undone), _flat(public.values))


def folded_weights(stolen: Stolen, public: PublicModel) -> Guesses | None:
    """Compare stolen projections with the public ones: the map between them is the key."""
    if stolen.v_proj is None or stolen.v_proj.shape != public.v_proj.shape:
        return None
    undone = np.empty_like(stolen.values)
    for head in range(public.heads):
        at = slice(head * public.head_dim, (head + 1) * public.head_dim)
        back = np.linalg.lstsq(stolen.v_proj[at].T, public.v_proj[at].T, rcond=None)[0]
        undone[:, head] = stolen.values[:, head] @ back
    return nearest(_flat(undone), _flat(public.values))


MOST_ANCHORS: Final = 16
"""Known rows that distances are taken to; fewer say nothing of a map."""

ATTACKS: Final = (
    Attack("collision", "pages as they are computed", collision),
    Attack("sorted values", "permutations of channels", sorted_values),
    Attack("Hadamard magnitudes", "secret signs and one Hadamard sum", hadamard_magnitudes),
    Attack("pair radii", "rotations that go through RoPE", pair_radii),
    Attack("norms", "rotations", norms),
    Attack("centred norms", "rotations and one shift for all rows", centred_norms),
    Attack("distances to known text", "rotations and a shift", known_distances),
    Attack("least squares on known text", "any linear map and shift", known_text),
    Attack("folded weights", "any linear map, by the weights it was folded into", folded_weights),
)


def _radii(x: FloatArray) -> FloatArray:
    low, high = np.split(x, 2, axis=-1)
    found: FloatArray = np.hypot(low, high)
    return found


def _lengths(keys: FloatArray, values: FloatArray) -> FloatArray:
    return _joined(*(np.linalg.norm(x, axis=-1) for x in (keys, values)))


def _flat(x: FloatArray) -> FloatArray:
    return x.reshape(len(x), -1)


def _joined(*parts: FloatArray) -> FloatArray:
    return np.concatenate([_flat(part) for part in parts], axis=1, dtype=np.float32)
