"""What spans mean together: two quasi-identifiers near each other point at a person.

One first name, one city or one illness tells little. Two or more of name, date, place, employer
and diagnosis within 64 tokens taint, however unsure each of them was, also across turns: the
scanner hands over the spans of the last turns with the new ones. Nothing here clears anything,
so a span that stays alone stays what it was, and grey is private.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.spans import CATEGORIES, Span, Verdict

QUASI: Final = frozenset({"person", "date", "location", "employer", "health"})
TOKEN_CHARS: Final = 4
"""Characters taken as a token; a script with shorter ones is judged over more tokens, not fewer."""
SCORE: Final = 0.9
SOURCE: Final = "context"


@dataclass(frozen=True, slots=True)
class ContextRules:
    """Which categories count together, how many of them, how near."""

    categories: frozenset[str] = QUASI
    needed: int = 2
    within_tokens: int = 64

    def __post_init__(self) -> None:
        """Refuse what could never taint."""
        unknown = sorted(self.categories - CATEGORIES)
        if unknown:
            raise ConfigError(f"categories: {unknown[0]!r} is none of {sorted(CATEGORIES)}")
        if not 2 <= self.needed <= len(self.categories):
            raise ConfigError(
                f"needed: {self.needed} categories can't meet; give 2 to {len(self.categories)}"
            )
        if self.within_tokens < 1:
            raise ConfigError("within_tokens: give at least 1")

    @property
    def version(self) -> str:
        """Return the parameters, spelled alike in every process."""
        return f"{','.join(sorted(self.categories))} {self.needed} {self.within_tokens}"

    def combine(self, spans: Sequence[Span]) -> list[Span]:
        """Return one tainting span for each place where enough categories meet.

        Of a chain's spans, with absolute offsets; spans that this made earlier are left aside.
        """
        reach = self.within_tokens * TOKEN_CHARS
        seen = sorted(
            span
            for span in spans
            if span.category in self.categories
            and span.verdict is not Verdict.CLEAR
            and span.source != SOURCE
        )
        found: list[Span] = []
        for last, span in enumerate(seen):
            near = {span.category: span.start}
            for earlier in reversed(seen[:last]):
                if span.start - earlier.end > reach or len(near) == self.needed:
                    break
                near.setdefault(earlier.category, earlier.start)
            if len(near) == self.needed:
                start = min(near.values())
                found.append(Span(start, span.end, "combination", "person", SCORE, SOURCE))
        return found
