"""All attacks on the same rows, and which one works best."""

from __future__ import annotations

import math
from typing import Final

import msgspec
import numpy as np

from kvkeep.audit.stolen.attacks import ATTACKS, Attack
from kvkeep.audit.stolen.nearest import Guesses
from kvkeep.audit.stolen.public import PublicModel
from kvkeep.audit.stolen.rows import Stolen

_OVER_CHANCE: Final = 5.0
"""Times chance from which guesses count as a leak."""
_SURE: Final = 0.5
"""Mean doubt below which guesses count as a leak where nothing says what is right."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one attack found."""

    name: str
    breaks: str
    doubt: float
    """Mean over rows of the nearest distance over the second nearest: lower is surer."""
    top1: float | None
    """Share of the rows, known ones left out, whose token was guessed; None: nobody says."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What all attacks found, the best first."""

    rows: int
    known: int
    vocab_size: int
    findings: tuple[Finding, ...]
    guesses: tuple[int, ...]
    """The best attack's."""

    @property
    def best(self) -> Finding:
        """Return the attack that works best."""
        return self.findings[0]

    @property
    def over_chance(self) -> float | None:
        """Return the best attack's hits over those of a blind guess; None: nobody says."""
        return None if self.best.top1 is None else self.best.top1 * self.vocab_size

    @property
    def leaks(self) -> bool:
        """Tell whether the rows give tokens away."""
        if self.over_chance is None:
            return self.best.doubt < _SURE
        return self.over_chance > max(_OVER_CHANCE, self._noise())

    def _noise(self) -> float:
        """Return how far above chance a few hits on few rows are by accident."""
        expected = max(1, self.rows - self.known) / self.vocab_size
        return (expected + 4 * math.sqrt(expected) + 2) / expected


def attack_rows(stolen: Stolen, public: PublicModel) -> Report:
    """Run every attack that what was stolen allows."""
    done: list[tuple[Attack, Guesses]] = []
    for attack in ATTACKS:
        guesses = attack.guess(stolen, public)
        if guesses is not None:
            done.append((attack, guesses))
    found = [
        (
            Finding(
                name=attack.name,
                breaks=attack.breaks,
                doubt=float(guesses.doubt.mean()),
                top1=_top1(guesses, stolen),
            ),
            guesses,
        )
        for attack, guesses in done
    ]
    found.sort(key=lambda one: (-(one[0].top1 or 0.0), one[0].doubt))
    return Report(
        rows=len(stolen),
        known=stolen.known,
        vocab_size=public.vocab_size,
        findings=tuple(finding for finding, _ in found),
        guesses=tuple(found[0][1].tokens.tolist()),
    )


def _top1(guesses: Guesses, stolen: Stolen) -> float | None:
    if stolen.tokens is None:
        return None
    return float(np.mean(guesses.tokens[stolen.known :] == stolen.tokens[stolen.known :]))
