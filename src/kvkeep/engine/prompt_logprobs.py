"""Log-probabilities of prompt tokens, taken in chunk by chunk as the prefill runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvkeep.engine.api import TokenLogprob
from kvkeep.engine.sampling import Sampler

TokenText = Callable[[int], str]


class PromptLogprobs:
    """Collects one entry per prompt token; the first has none."""

    def __init__(self, prompt_ids: tuple[int, ...], top: int, text: TokenText) -> None:
        self._ids = prompt_ids
        self._top = top
        self._text = text
        self._entries: list[TokenLogprob | None] = [None]

    def add(self, sampler: Sampler, logits: torch.Tensor, first_position: int) -> None:
        """Take in logits [N, V] of positions from `first_position`; each scores the token after it.

        Positions seen before (a preempted prefill that runs again) are skipped.
        """
        known = len(self._entries)
        begin = max(known, first_position + 1)
        end = min(first_position + 1 + len(logits), len(self._ids))
        if begin >= end:
            return
        rows = logits[begin - first_position - 1 : end - first_position - 1]
        for scores in sampler.score(rows, self._ids[begin:end], self._top):
            top = tuple((i, self._text(i), value) for i, value in scores.top)
            text = self._text(scores.token_id)
            self._entries.append(TokenLogprob(scores.token_id, text, scores.logprob, top))

    def result(self) -> tuple[TokenLogprob | None, ...]:
        """Return the entries so far, one per prompt token once the prefill is done."""
        return tuple(self._entries)
