"""Choose the next token of every sequence of a step from its row of logits.

Each row is handled alone, on one thread, with randomness that depends only on (seed, sample index,
position): a sequence draws the same tokens alone, in any batch, and after a preemption.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.draw import Nucleus, RowRanker, draw_nuclei, draw_sorted
from kvkeep.engine.philox import uniform
from kvkeep.errors import EngineError, InvalidRequest
from kvkeep.ops.layout import SampleOps
from kvkeep.types import FloatArray

GREEDY_BELOW: Final = 1e-5
"""Temperatures below this one take the most likely token."""

_NOT_FINITE: Final = (
    "the model's output for this sequence is infinite or not a number: check its weights"
)
_NOTHING_LEFT: Final = "no token is left to choose from: relax logit_bias or min_tokens"


class TokenScores(NamedTuple):
    """A token's natural-log probability as the model gave it, before any setting."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, best first."""


class Sampled(NamedTuple):
    """One entry per row; where `errors` has one, the row's token id is -1."""

    token_ids: list[int]
    scores: list[TokenScores | None]
    errors: list[EngineError | None]


class SequenceSampling:
    """What one sequence's sampling remembers between steps."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        sample_index: int,
        vocab_size: int,
        eos_ids: Iterable[int],
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.sample_index = sample_index
        self.position = len(prompt_ids)
        self._generated = 0
        self._bias_ids, self._bias = _bias_arrays(params, vocab_size)
        held = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        self._held_ids = np.array(sorted(i for i in held if 0 <= i < vocab_size), np.intp)
        self._counts = _TokenCounts() if _penalises(params) else None
        if self._counts is not None and params.repetition_penalty != 1.0:
            for token_id in dict.fromkeys(prompt_ids):
                self._counts.add(token_id, 0)

    @property
    def greedy(self) -> bool:
        """Tell whether the most likely token is taken, without randomness."""
        return self.params.temperature < GREEDY_BELOW

    @property
    def edits(self) -> bool:
        """Tell whether `edit` would change the next row."""
        return self._counts is not None or len(self._bias_ids) > 0 or self._holds_back

    @property
    def _holds_back(self) -> bool:
        return self._generated < self.params.min_tokens and len(self._held_ids) > 0

    def edit(self, row: FloatArray) -> None:
        """Apply penalties, then logit_bias, then the min_tokens mask to logits `[V]` in place."""
        if self._counts is not None:
            self._counts.penalise(row, self.params)
        row[self._bias_ids] += self._bias
        if self._holds_back:
            row[self._held_ids] = -np.inf

    def accept(self, token_id: int) -> None:
        """Note that the sequence goes on with `token_id`."""
        self.position += 1
        self._generated += 1
        if self._counts is not None:
            self._counts.add(token_id, 1)

    def uniform(self, draw: int) -> float:
        """Return the `draw`-th random number of the current position."""
        return uniform(self.seed, self.sample_index, self.position, draw)


class Sampler:
    """Chooses tokens from rows of `vocab_size` logits; for one thread at a time."""

    def __init__(self, vocab_size: int, ops: SampleOps) -> None:
        self._vocab = vocab_size
        self._ops = ops
        self._ranker = RowRanker(vocab_size)
        self._widened = np.empty(vocab_size, np.float32)
        self._edited: list[FloatArray] = []

    def sample(self, logits: torch.Tensor, states: Sequence[SequenceSampling]) -> Sampled:
        """Choose a token per row of logits `[R, V]`, float32 or bfloat16; the caller accepts."""
        logits = _dense(logits)
        rows = self._edited_rows(logits, states)
        count = len(states)
        result = Sampled([-1] * count, [None] * count, [None] * count)
        nuclei: dict[int, Nucleus] = {}
        for index, (state, best) in enumerate(zip(states, self._ops.largest(rows), strict=True)):
            if not math.isfinite(best.logit):
                nothing_left = best.logit == -math.inf
                result.errors[index] = EngineError(_NOTHING_LEFT if nothing_left else _NOT_FINITE)
            elif state.greedy:
                result.token_ids[index] = best.token
            elif 0 < state.params.top_k < self._vocab:
                result.token_ids[index] = self._draw_top_k(rows[index], state)
            else:
                nuclei[index] = _nucleus(rows[index], best.logit, state)
        drawn = draw_nuclei(self._ops, list(nuclei.values()))
        for index, token_id in zip(nuclei, drawn, strict=True):
            result.token_ids[index] = token_id
        for index, state in enumerate(states):
            top_n = state.params.logprobs
            if top_n is not None and result.errors[index] is None:
                row = self._float_row(logits[index])
                result.scores[index] = self._score(row, result.token_ids[index], top_n)
        return result

    def score(
        self, logits: torch.Tensor, token_ids: Sequence[int], top_n: int
    ) -> list[TokenScores]:
        """Score known tokens, one per row of logits `[R, V]`, as `prompt_logprobs` needs."""
        logits = _dense(logits)
        return [
            self._score(self._float_row(logits[index]), token_id, top_n)
            for index, token_id in enumerate(token_ids)
        ]

    def rank(self, logits: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
        """Return the `count` likeliest tokens of logits `[V]` with their log-probabilities.

        Raises `EngineError` where the logits are not finite.
        """
        row = self._float_row(_dense(logits))
        if not math.isfinite(row.max()):
            raise EngineError(_NOT_FINITE)
        shift = self._ranker.log_total(row)
        best = self._ranker.top_ids(row, count)
        return tuple((int(i), float(row[i]) - shift) for i in best)

    def _edited_rows(
        self, logits: torch.Tensor, states: Sequence[SequenceSampling]
    ) -> list[torch.Tensor]:
        """Return each row as its sequence's settings change it, valid until the next call."""
        rows = list(logits[: len(states)].unbind())
        edited = [index for index, state in enumerate(states) if state.edits]
        while len(self._edited) < len(edited):
            self._edited.append(np.empty(self._vocab, np.float32))
        for index, to in zip(edited, self._edited, strict=False):
            _widen(rows[index], to)
            states[index].edit(to)
            rows[index] = torch.from_numpy(to)
        return rows

    def _float_row(self, row: torch.Tensor) -> FloatArray:
        """Return logits `[V]` as float32; a bfloat16 row is valid until the next call."""
        if row.dtype == torch.float32:
            array: FloatArray = row.cpu().numpy()
            return array
        _widen(row, self._widened)
        return self._widened

    def _draw_top_k(self, row: torch.Tensor, state: SequenceSampling) -> int:
        params, logits = state.params, self._float_row(row)
        ids = self._ranker.top_ids(logits, params.top_k)
        return draw_sorted(
            ids, logits[ids], state.uniform(0), params.temperature, params.top_p, params.min_p
        )

    def _score(self, row: FloatArray, token_id: int, top_n: int) -> TokenScores:
        shift = self._ranker.log_total(row)
        best = self._ranker.top_ids(row, top_n) if top_n > 0 else ()
        return TokenScores(
            token_id,
            float(row[token_id]) - shift,
            tuple((int(i), float(row[i]) - shift) for i in best),
        )


def _dense(logits: torch.Tensor) -> torch.Tensor:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise EngineError(f"logits must be float32 or bfloat16, not {logits.dtype}")
    return logits.detach().contiguous()


def _widen(row: torch.Tensor, to: FloatArray) -> None:
    """Copy logits `[V]`, float32 or bfloat16, to float32."""
    if row.dtype == torch.float32:
        np.copyto(to, row.cpu().numpy())
        return
    words = to.view(np.uint32)
    np.copyto(words, row.cpu().view(torch.uint16).numpy())
    np.left_shift(words, 16, out=words)


def _nucleus(row: torch.Tensor, top: float, state: SequenceSampling) -> Nucleus:
    params = state.params
    return Nucleus(row, top, params.temperature, params.min_p, params.top_p, state.uniform)


class _TokenCounts:
    """How often each token was generated, for tokens of the prompt (0) and of the output."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids: NDArray[np.intp] = np.zeros(64, np.intp)
        self._counts: FloatArray = np.zeros(64, np.float32)

    def add(self, token_id: int, count: int) -> None:
        """Add `count` to a token's count."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        self._counts[slot] += count

    def penalise(self, row: FloatArray, params: SamplingParams) -> None:
        """Lower the logits of tokens seen before: repetition first, then frequency and presence."""
        ids, counts = self._ids[: len(self._slots)], self._counts[: len(self._slots)]
        seen = row[ids]
        factor = np.float32(params.repetition_penalty)
        seen = np.where(seen > 0, seen / factor, seen * factor)
        seen -= np.float32(params.frequency_penalty) * counts
        seen -= np.float32(params.presence_penalty) * (counts > 0)
        row[ids] = seen


def _penalises(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _bias_arrays(params: SamplingParams, vocab_size: int) -> tuple[NDArray[np.intp], FloatArray]:
    bias = dict(params.logit_bias)
    if any(not 0 <= token_id < vocab_size for token_id in bias):
        raise InvalidRequest(
            f"logit_bias names a token outside the vocabulary of {vocab_size}", param="logit_bias"
        )
    return np.array(list(bias), np.intp), np.array(list(bias.values()), np.float32)
