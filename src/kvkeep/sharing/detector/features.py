"""Text as tokens and hashed features, in whole-array numpy: what the learned scorer reads.

A word or a number is one token, a Han or kana character is one, and so is a sign. Features are
character n-grams at both ends of a token (over its neighbours too where a script has no spaces),
the token itself, its shape, and the pair it makes with the next one.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

BITS: Final = 17
"""The table of embeddings has 2 ** BITS rows; row 0 is none."""
GRAMS: Final = (2, 3, 4, 5)
INNER: Final = 4
"""Trigrams that start inside a token."""
FEATURES: Final = 2 * len(GRAMS) + INNER + 3
PAD: Final = 8
BASE: Final = np.uint64(0x9E3779B97F4A7C15)
MIX: Final = np.uint64(0xD6E8FEB86659FD93)

SPACE, LOWER, UPPER, LETTER, DIGIT, SINGLE, SIGN, LINE = range(8)

Ids = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint64]


class Tokens(NamedTuple):
    """Where tokens stand, `[T]` each, and their features' rows, `[T, FEATURES]`."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    features: Ids


class Tables(NamedTuple):
    """Per code point of the basic plane: its class, and what it counts as in an n-gram."""

    classes: npt.NDArray[np.uint8]
    folded: Codes


SPACELESS: Final = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x0E00, 0x0E7F))
"""Kana, Han, Thai."""


def _class_of(code: int) -> int:
    """Return the class of a code point."""
    if any(low <= code <= high for low, high in SPACELESS):
        return SINGLE
    char = chr(code)
    category = unicodedata.category(char)
    if char == "\n":
        return LINE
    if category in {"Zs", "Zl", "Zp", "Cc", "Cf"}:
        return SPACE
    if category == "Nd":
        return DIGIT
    if category in {"Lu", "Lt"}:
        return UPPER
    if category in {"Ll", "Mn", "Mc"}:
        return LOWER
    return LETTER if category in {"Lo", "Lm"} else SIGN


@cache
def tables() -> Tables:
    """Return the tables, made once."""
    classes = np.fromiter(map(_class_of, range(0x10000)), np.uint8, 0x10000)
    lower = ((chr(code).lower(), code) for code in range(0x10000))
    folded = np.fromiter((ord(t) if len(t) == 1 else c for t, c in lower), np.uint64, 0x10000)
    folded[classes == DIGIT] = ord("0")
    return Tables(classes, folded)


def _rows(hashes: Codes, salt: int) -> Ids:
    """Return the table's rows of some hashes; never row 0."""
    mixed = (hashes + np.uint64(salt * int(BASE) % 2**64)) * MIX
    mixed ^= mixed >> np.uint64(29)
    rows = (mixed * BASE) >> np.uint64(64 - BITS)
    found: Ids = np.maximum(rows, 1).astype(np.int32)
    return found


def _split(classes: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where tokens start and end."""
    group = np.array([0, 1, 1, 1, 2, 3, 3, 3], np.uint8)[classes]
    changes = np.ones(len(group) + 1, np.bool_)
    changes[1:-1] = (group[1:] != group[:-1]) | (group[1:] == 3)
    edges = np.flatnonzero(changes)
    keep = group[edges[:-1]] != 0
    return edges[:-1][keep], edges[1:][keep]


def _words(folded: Codes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Codes:
    """Return a hash of each whole token."""
    sizes = ends - starts
    powers = np.cumprod(np.full(int(sizes.max()), BASE), dtype=np.uint64)
    begins = np.cumsum(sizes) - sizes
    inside = np.arange(int(sizes.sum())) - np.repeat(begins, sizes)
    terms = folded[np.repeat(starts, sizes) + inside] * powers[inside]
    return np.add.reduceat(terms, begins, dtype=np.uint64)


def _shapes(
    classes: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> Codes:
    """Return a number for each token's case, class and length."""
    uppers = np.concatenate(([0], np.cumsum(classes == UPPER)))
    count = uppers[ends] - uppers[starts]
    sizes = np.minimum(ends - starts, 24)
    case = np.where(count == 0, 0, np.where(count == 1, 1, np.where(count == sizes, 2, 3)))
    first = classes[starts].astype(np.int64)
    numbers: Codes = (((first * 4 + case) * 32 + sizes) + 1).astype(np.uint64)
    return numbers


def tokenise(text: str) -> Tokens:
    """Return a text's tokens."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    table = tables()
    plane = np.minimum(codes, 0xFFFF)
    classes = np.where(codes > 0x1FFFF, SINGLE, table.classes[plane]).astype(np.uint8)
    starts, ends = _split(classes)
    if not len(starts):
        return Tokens(starts, ends, np.zeros((0, FEATURES), np.int32))
    folded = np.where(codes > 0xFFFF, codes, table.folded[plane]).astype(np.uint64) + np.uint64(1)
    padded = np.zeros(len(folded) + 2 * PAD, np.uint64)
    padded[PAD:-PAD] = folded
    grams: dict[int, Codes] = {1: padded}
    for n in range(2, GRAMS[-1] + 1):
        grams[n] = grams[n - 1][:-1] * BASE + padded[n - 1 :]
    sizes = ends - starts
    single = classes[starts] == SINGLE
    columns = []
    for n in GRAMS:
        fits = single | (sizes >= n)
        columns.append(np.where(fits, _rows(grams[n][starts + PAD], n), 0))
        columns.append(np.where(fits, _rows(grams[n][ends - n + PAD], 16 + n), 0))
    for at in range(1, INNER + 1):
        fits = single | (sizes >= at + 3)
        columns.append(
            np.where(fits, _rows(grams[3][np.minimum(starts + at, len(codes)) + PAD], 3), 0)
        )
    words = _words(folded, starts, ends)
    after = np.append(words[1:], np.uint64(0))
    columns.append(_rows(_shapes(classes, starts, ends), 40))
    columns.append(_rows(words, 41))
    columns.append(_rows(words * MIX + after, 42))
    return Tokens(starts, ends, np.stack(columns, axis=1).astype(np.int32))
