"""Text as tokens and hashed features, in whole-array numpy: what the learned scorer reads.

A word or a number is one token, a Han or kana character is one, and so is a sign. Features are
character n-grams at both ends of a token (over its neighbours too where a script has no spaces),
the token itself, its shape, and the pair it makes with the next one; what a lexicon knows it for,
and what the rules found there.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.sharing.detector.spans import Span, Verdict

BITS: Final = 17
"""The table of embeddings has 2 ** BITS rows; row 0 is none."""
GRAMS: Final = (2, 3, 4, 5)
INNER: Final = 4
"""Trigrams that start inside a token."""
KNOWN: Final = 2
"""Columns of the lexicon: for the word or character, and for the longer name it is part of."""
FEATURES: Final = 2 * len(GRAMS) + INNER + 3 + KNOWN + 1
LEXICON_BITS: Final = 20
NAME_LETTERS: Final = (2, 3, 4)
"""Characters of a name that the lexicon knows in a script without spaces."""
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


class Lexicon(NamedTuple):
    """What words are known for, as bits: hashed, so that one in some hundreds is taken wrongly."""

    bits: npt.NDArray[np.uint8]
    """`[2 ** LEXICON_BITS]`"""

    @classmethod
    def of(cls, classes: Iterable[Iterable[str]]) -> Lexicon:
        """Return the lexicon of at most eight classes, of names as `name_codes` reads them."""
        bits = np.zeros(2**LEXICON_BITS, np.uint8)
        for place, names in enumerate(classes):
            found = [code for name in names for code in name_codes(name)]
            for at in _places(np.array(found, np.uint64)):
                bits[at] |= np.uint8(1 << place)
        return cls(bits)

    def known(self, codes: Codes) -> npt.NDArray[np.uint8]:
        """Return the bits of some hashed words."""
        one, other = _places(codes)
        found: npt.NDArray[np.uint8] = self.bits[one] & self.bits[other]
        return found


def _places(codes: Codes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the two places of some hashed words in a lexicon."""
    mixed = (codes ^ (codes >> np.uint64(31))) * MIX
    one, other = (value >> np.uint64(64 - LEXICON_BITS) for value in (mixed, mixed * BASE))
    return one.astype(np.int64), other.astype(np.int64)


def name_codes(name: str) -> list[np.uint64]:
    """Return the hashes under which a text's tokens are looked up for a name.

    A name of one word has one; a longer one, each pair of its neighbours; a name in a script
    without spaces, its characters together.
    """
    codes = np.frombuffer(name.encode("utf-32-le"), np.uint32)
    if not len(codes) or int(codes.max()) > 0xFFFF:
        return []
    classes, folded = tables().classes[codes], tables().folded[codes] + np.uint64(1)
    starts, ends = _split(classes)
    if len(starts) > 1 and (classes == SINGLE).all():
        whole = 0
        for letter in folded.tolist():
            whole = (whole * int(BASE) + letter) % 2**64
        return [np.uint64(whole)] if len(codes) in NAME_LETTERS else []
    words = _words(folded, starts, ends) if len(starts) else folded[:0]
    return list(words if len(words) == 1 else _pairs(words)[:-1])


def _pairs(words: Codes) -> Codes:
    """Return a hash of each word with the next one."""
    pairs: Codes = words * MIX + np.append(words[1:], np.uint64(0))
    return pairs


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


def _folded(code: int) -> int:
    """Return a letter in lower case, a Latin one without marks."""
    lower = chr(code).lower()
    if len(lower) != 1:
        return code
    base = unicodedata.normalize("NFD", lower)[0]
    return ord(base) if base.isascii() else ord(lower)


@cache
def tables() -> Tables:
    """Return the tables, made once."""
    classes = np.fromiter(map(_class_of, range(0x10000)), np.uint8, 0x10000)
    folded = np.fromiter(map(_folded, range(0x10000)), np.uint64, 0x10000)
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


def tokenise(text: str, lexicon: Lexicon | None = None, hints: Sequence[Span] = ()) -> Tokens:
    """Return a text's tokens; hints are what the rules found in it."""
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
    pairs = _pairs(words)
    columns.append(_rows(_shapes(classes, starts, ends), 40))
    columns.append(_rows(words, 41))
    columns.append(_rows(pairs, 42))
    if lexicon is None:
        columns += [np.zeros(len(starts), np.int32)] * KNOWN
    else:
        known = lexicon.known(pairs)
        known[1:] |= known[:-1].copy()
        if single.any():
            for n in NAME_LETTERS:
                known |= np.where(single, lexicon.known(grams[n][starts + PAD]), 0).astype(np.uint8)
        columns += [_bit_rows(lexicon.known(words), 43), _bit_rows(known, 44)]
    columns.append(_hinted(hints, starts, ends))
    return Tokens(starts, ends, np.stack(columns, axis=1).astype(np.int32))


def _bit_rows(bits: npt.NDArray[np.uint8], salt: int) -> Ids:
    """Return the table's rows of what a lexicon knows."""
    found: Ids = np.where(bits > 0, _rows(bits.astype(np.uint64), salt), 0).astype(np.int32)
    return found


@cache
def hint_row(kind: str, verdict: Verdict) -> int:
    """Return the table's row of what a rule found."""
    digest = hashlib.sha256(f"{kind} {verdict}".encode()).digest()
    return int(_rows(np.array([int.from_bytes(digest[:8], "little")], np.uint64), 45)[0])


def _hinted(
    hints: Sequence[Span], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> Ids:
    """Return the column of what the rules found; of several finds, the surest."""
    column = np.zeros(len(starts), np.int32)
    for span in sorted(hints, key=lambda one: one.score):
        first, last = np.searchsorted(ends, span.start, "right"), np.searchsorted(starts, span.end)
        column[first:last] = hint_row(span.kind, span.verdict)
    return column
