"""What a recogniser finds: spans of text that may be sensitive, and how sure it is."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple, Protocol

TAINT_ABOVE: Final = 0.7
CLEAR_BELOW: Final = 0.3

CATEGORIES: Final = frozenset(
    {
        "credential",
        "identifier",
        "contact",
        "finance",
        "person",
        "location",
        "health",
        "date",
        "employer",
    }
)
"""What a span's kind belongs to."""


class Verdict(IntEnum):
    """Of a span or a text; the larger one wins."""

    CLEAR = 0
    GREY = 1
    TAINT = 2


class Span(NamedTuple):
    """Where something sensitive may stand."""

    start: int
    """Characters from the start of the scanned text."""
    end: int
    kind: str
    """Such as email, jp_my_number, person_name, diagnosis, api_key."""
    category: str
    """One of `CATEGORIES`."""
    score: float
    """0 to 1; a rule with a valid checksum has 1."""
    source: str
    """rule, scorer, context or organisation."""

    @property
    def verdict(self) -> Verdict:
        """Return TAINT above 0.7, CLEAR below 0.3, GREY between."""
        if self.score > TAINT_ABOVE:
            return Verdict.TAINT
        return Verdict.CLEAR if self.score < CLEAR_BELOW else Verdict.GREY


class Recogniser(Protocol):
    """Finds spans of some kinds; pure. The caller hands over normalised text."""

    def spans(self, text: str) -> list[Span]:
        """Return what was found, in any order, with offsets into `text`."""
