"""Beam search over log-probabilities: which continuations live on, and which texts are kept.

Of all continuations of a step by one token, best first:

    ends (end of text, a stop id, the last token allowed), among the first `width`  -> kept
    goes on                                                  the first `width`      -> beams

A text is worth the sum of its tokens' log-probabilities over its length to the power of
`length_penalty`; the `width` best are kept. The search ends once the best beam, taken at its
present length, is worth no more than the worst of them. Nothing here knows of caches or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count as count_from
from typing import NamedTuple

from kvkeep.engine.sampling import TokenScores

Ranked = tuple[tuple[int, float], ...]
"""The most likely next tokens of a beam with their natural-log probabilities, best first."""


class Beam(NamedTuple):
    """A text that goes on."""

    parent: int
    """Place among the beams of the step before."""
    logprob: float
    tokens: tuple[TokenScores, ...]


class Hypothesis(NamedTuple):
    """A text that ended."""

    score: float
    tokens: tuple[TokenScores, ...]


class _Candidate(NamedTuple):
    """A beam and one more token."""

    logprob: float
    parent: int
    token: TokenScores


@dataclass(slots=True)
class BeamSearch:
    """The search of one request."""

    width: int
    max_tokens: int
    min_tokens: int = 0
    length_penalty: float = 1.0
    ending: frozenset[int] = frozenset()
    """Tokens that end a text, once it has `min_tokens`."""
    top: int = 0
    """Alternatives to keep with each token."""
    beams: list[Beam] = field(default_factory=lambda: [Beam(0, 0.0, ())])
    """Best first; none once the search has ended."""
    kept: list[Hypothesis] = field(default_factory=list)
    """Best first."""
    generated: int = 0
    """Tokens that beams and kept texts have grown by."""

    @property
    def wanted(self) -> int:
        """Return how many of each beam's next tokens decide a step."""
        return max(self.width + len(self.ending), self.top)

    @property
    def length(self) -> int:
        """Return the tokens of every beam."""
        return len(self.beams[0].tokens)

    def advance(self, ranked: Sequence[Ranked]) -> None:
        """Take the next tokens of each beam: `beams` are now those that go on."""
        length = self.length + 1
        last = length >= self.max_tokens
        running: list[Beam] = []
        for place, candidate in enumerate(self._candidates(ranked)):
            if last or candidate.token.token_id in self.ending:
                if place < self.width:
                    self._keep(self._grown(candidate))
            elif len(running) < self.width:
                running.append(self._grown(candidate))
        self.beams = [] if self._settled(running, length) else running

    def close(self) -> None:
        """End the search here: the beams are texts like any other."""
        for beam in self.beams:
            if beam.tokens:
                self._keep(beam)
        self.beams = []

    def _candidates(self, ranked: Sequence[Ranked]) -> list[_Candidate]:
        """Return every beam with every next token, best first, equal ones by beam."""
        held = self.ending if self.length < self.min_tokens else ()
        found = []
        for parent, (beam, tokens) in enumerate(zip(self.beams, ranked, strict=True)):
            top = tokens[: self.top]
            for token, logprob in tokens:
                if logprob > -float("inf") and token not in held:
                    scores = TokenScores(token, logprob, top)
                    found.append(_Candidate(beam.logprob + logprob, parent, scores))
        return sorted(found, key=lambda candidate: -candidate.logprob)

    def _grown(self, candidate: _Candidate) -> Beam:
        self.generated += 1
        tokens = (*self.beams[candidate.parent].tokens, candidate.token)
        return Beam(candidate.parent, candidate.logprob, tokens)

    def _keep(self, beam: Beam) -> None:
        score = self._worth(beam.logprob, len(beam.tokens))
        self.kept.append(Hypothesis(score, beam.tokens))
        self.kept.sort(key=lambda one: -one.score)
        del self.kept[self.width :]

    def _settled(self, running: Sequence[Beam], length: int) -> bool:
        """Tell whether no beam can be expected to be kept any more."""
        if not running:
            return True
        full = len(self.kept) == self.width
        return full and self._worth(running[0].logprob, length) <= self.kept[-1].score

    def _worth(self, logprob: float, length: int) -> float:
        return logprob / math.pow(length, self.length_penalty)


def places(parents: Sequence[int], count: int) -> list[int]:
    """Return a place for each beam: its parent's for the first child, else a free or a new one.

    `count` places are taken; most beams stay where their parent was, so that few are copied.
    """
    stays: dict[int, int] = {}
    for child, parent in enumerate(parents):
        stays.setdefault(parent, child)
    free = (place for place in count_from(0) if place >= count or place not in stays)
    return [
        parent if stays[parent] == child else next(free) for child, parent in enumerate(parents)
    ]
