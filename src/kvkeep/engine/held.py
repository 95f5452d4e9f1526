"""Requests of which only the best sequences are told: chunks wait here until all have ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import msgspec

from kvkeep.engine.api import Chunk, FinishReason

GOOD = (FinishReason.STOP, FinishReason.LENGTH)
"""How a sequence may end that its client is told of as an answer."""


class Held(Protocol):
    """What a request's sequences would have sent, until all of them have ended."""

    def add(self, chunk: Chunk) -> None:
        """Take a chunk of one sequence."""

    def result(self) -> list[Chunk]:
        """Return one chunk for each of the `n` sequences that are told."""


class BestOf:
    """Keeps the `n` sequences with the highest mean log-probability per generated token."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._chunks: dict[int, list[Chunk]] = defaultdict(list)
        self._logprobs: dict[int, float] = defaultdict(float)
        self._failure: Chunk | None = None

    def note(self, index: int, logprob: float) -> None:
        """Count a token of sequence `index` as the model scored it, before any setting."""
        self._logprobs[index] += logprob

    def add(self, chunk: Chunk) -> None:
        """Take a chunk of one sequence; one that fails fails the request."""
        self._chunks[chunk.index].append(chunk)
        if chunk.finish not in (None, *GOOD):
            self._failure = self._failure or chunk

    def result(self) -> list[Chunk]:
        """Return the best sequences, best first, equal ones in the order they were begun."""
        if self._failure is not None:
            return failures(self._failure, self._n)
        whole = [joined(self._chunks[index]) for index in sorted(self._chunks)]
        scored = [msgspec.structs.replace(chunk, score=self._mean(chunk)) for chunk in whole]
        best = sorted(scored, key=lambda chunk: -(chunk.score or 0.0))[: self._n]
        return told(best, sum(len(chunk.token_ids) for chunk in whole), whole[0])

    def _mean(self, chunk: Chunk) -> float:
        return self._logprobs[chunk.index] / max(1, len(chunk.token_ids))


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Return a sequence's chunks as one."""
    first, last = chunks[0], chunks[-1]
    return msgspec.structs.replace(
        last,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        prompt_logprobs=first.prompt_logprobs,
    )


def told(best: Sequence[Chunk], generated: int, first: Chunk) -> list[Chunk]:
    """Return the chunks to send, numbered from 0.

    The first has the prompt's log-probabilities of `first` and counts what of `generated` tokens is
    not sent.
    """
    unsent = max(0, generated - sum(len(chunk.token_ids) for chunk in best))
    numbered = [
        msgspec.structs.replace(c, index=i, prompt_logprobs=None) for i, c in enumerate(best)
    ]
    numbered[0] = msgspec.structs.replace(
        numbered[0], unsent_tokens=unsent, prompt_logprobs=first.prompt_logprobs
    )
    return numbered


def failures(chunk: Chunk, n: int) -> list[Chunk]:
    """Return the ending of `chunk` for each of `n` sequences."""
    return [
        Chunk(index=i, finish=chunk.finish, error=chunk.error, cached_tokens=chunk.cached_tokens)
        for i in range(n)
    ]
