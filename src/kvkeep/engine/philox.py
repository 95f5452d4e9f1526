"""Philox4x32-10: random words as a pure function of a key and a counter.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10
_WORD: Final = 0xFFFF_FFFF


class Words(NamedTuple):
    """Four unsigned 32-bit words."""

    w0: int
    w1: int
    w2: int
    w3: int


def philox4x32(key: int, counter: Words) -> Words:
    """Return four random words for a 64-bit key and a 128-bit counter."""
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        low, high = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (high >> 32) ^ c1 ^ k0,
            high & _WORD,
            (low >> 32) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return Words(c0, c1, c2, c3)


def uniform(seed: int, sample_index: int, position: int, draw: int = 0) -> float:
    """Return the `draw`-th float64 of one position of one sequence, in (0, 1) without its ends."""
    words = philox4x32(seed, Words(position & _WORD, sample_index & _WORD, draw & _WORD, 0))
    mantissa = (words.w0 << 20) | (words.w1 >> 12)
    return (mantissa + 0.5) * 2.0**-52
