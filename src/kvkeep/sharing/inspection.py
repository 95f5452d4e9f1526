"""How far a prompt may be shared: its text is read as a whole, and any doubt ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvkeep.types import Int32Array

UNDECODABLE = "\ufffd"

DecodeText = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens written out."""


class Inspector(Protocol):
    """Finds what may not be shared in a prompt's text; a pure function of it."""

    @property
    def version(self) -> str:
        """Return a name of its rules, weights and thresholds; votes do not outlive a change."""

    def first_doubt(self, text: str) -> int | None:
        """Return the character from which on the text is not clear; None where all of it is."""


class ClearsNothing:
    """The inspector of a server without a detector: every text is doubtful from its start."""

    version = "none"

    def first_doubt(self, text: str) -> int | None:
        """Return 0."""
        return 0


class Found(Protocol):
    """What a detector reports of one place."""

    @property
    def start(self) -> int:
        """Return characters from the start of the text."""

    @property
    def verdict(self) -> int:
        """Return 0 for clear, more for grey and tainted."""


class Scanner(Protocol):
    """Reads one chain's text from its start."""

    def feed(self, text: str) -> Iterable[Found]:
        """Return what stands in the text so far."""


class Reads(Protocol):
    """A detector; its rules may change while it runs."""

    @property
    def version(self) -> str:
        """Return a name of all rules and weights in force."""

    def scanner(self) -> Scanner:
        """Return a scanner at the start of a chain."""


class Detects:
    """An inspector over a detector: grey is as good as tainted."""

    def __init__(self, detector: Reads) -> None:
        self._detector = detector

    @property
    def version(self) -> str:
        """Return the version of the rules in force now."""
        return self._detector.version

    def first_doubt(self, text: str) -> int | None:
        """Return where the first span that is not clear begins."""
        found = self._detector.scanner().feed(text)
        return min((s.start for s in found if s.verdict != 0), default=None)


def cleared_units(
    token_ids: Int32Array,
    unit_tokens: int,
    decode: DecodeText,
    inspector: Inspector,
    known: int = 0,
) -> int:
    """Return how many leading units of a prompt are clear.

    What cannot be decoded is doubtful, and so is a unit without any text. Of the units known to be
    clear the last is read again, for what may begin in it, and the ones before it are not.
    """
    first = max(known - 1, 0)
    ids = token_ids[first * unit_tokens :].tolist()
    units = len(ids) // unit_tokens
    text = decode(ids)
    if first:
        text = text.lstrip(UNDECODABLE)  # a character that the cut has halved
    doubts = [inspector.first_doubt(text), _or_none(text.find(UNDECODABLE))]
    doubt = min((at for at in doubts if at is not None), default=None)
    for unit in range(units):
        if not decode(ids[unit * unit_tokens : (unit + 1) * unit_tokens]):
            units = unit
            break
    if doubt is not None:
        units = _whole_before(doubt, units, lambda unit: len(decode(ids[: unit * unit_tokens])))
    return first + units


def _whole_before(doubt: int, units: int, length: Callable[[int], int]) -> int:
    """Return the most leading units whose text, `length` characters, ends by `doubt`."""
    low, high = 0, units
    while low < high:
        middle = (low + high + 1) // 2
        if length(middle) <= doubt:
            low = middle
        else:
            high = middle - 1
    return low


def _or_none(at: int) -> int | None:
    return None if at < 0 else at
