"""From sampled tokens to chunks: detokenise, watch for stops, attach log-probabilities."""

from __future__ import annotations

import msgspec

from kvkeep.engine.api import Chunk, FinishReason, GenerateRequest, TokenLogprob
from kvkeep.engine.beams import BeamSearch
from kvkeep.engine.prompt_logprobs import PromptLogprobs
from kvkeep.engine.sampling import SequenceSampling, TokenScores
from kvkeep.engine.stops import StopChecker
from kvkeep.models.text import DecodeStream, TextModel


class OutputFactory:
    """Makes the per-sequence parts that depend on the tokenizer."""

    def __init__(self, text: TextModel, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._text = text
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids

    def sampling(self, spec: GenerateRequest, index: int, seed: int) -> SequenceSampling:
        """Return the sampling state of sequence `index`; siblings share a seed, not an index."""
        scored = 0 if spec.params.ranks else None
        logprobs = scored if spec.params.logprobs is None else spec.params.logprobs
        return SequenceSampling(
            msgspec.structs.replace(spec.params, seed=seed, logprobs=logprobs),
            spec.prompt_ids,
            sample_index=index,
            vocab_size=self._vocab_size,
            eos_ids=self._eos_ids,
        )

    def search(self, spec: GenerateRequest, room: int) -> BeamSearch:
        """Return the beam search of a request that has `room` for as many tokens."""
        params = spec.params
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._eos_ids))
        return BeamSearch(
            width=params.width,
            max_tokens=min(params.max_tokens, room),
            min_tokens=params.min_tokens,
            length_penalty=params.length_penalty,
            ending=frozenset(ends),
            top=params.logprobs or 0,
        )

    def sequence(self, spec: GenerateRequest, index: int) -> SequenceOutput:
        """Return the output side of sequence `index`; the first scores the prompt too."""
        params, prompt = spec.params, None
        if params.prompt_logprobs is not None and index == 0:
            prompt = PromptLogprobs(spec.prompt_ids, params.prompt_logprobs, self._text.token_text)
        stream = self._text.stream(
            after=spec.prompt_ids[-16:], skip_special_tokens=params.skip_special_tokens
        )
        stops = StopChecker(params, self._eos_ids)
        return SequenceOutput(index, self._text, stream, stops, prompt)


class SequenceOutput:
    """Turns one sequence's tokens into chunks.

    A token whose text may still become part of a stop string waits, with its log-probabilities,
    until it can't.
    """

    def __init__(
        self,
        index: int,
        text: TextModel,
        stream: DecodeStream,
        stops: StopChecker,
        prompt: PromptLogprobs | None,
    ) -> None:
        self.prompt = prompt
        self._index = index
        self._text = text
        self._stream = stream
        self._stops = stops
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._first = True

    def push(
        self, token_id: int, scores: TokenScores | None, cached: int, *, last: bool
    ) -> Chunk | None:
        """Take one token; return a chunk where there is text to send or the sequence ends."""
        self._ids.append(token_id)
        if scores is not None:
            self._logprobs.append(self._named(scores))
        verdict = self._stops.push(token_id, self._stream.step(token_id))
        if verdict.stopped:
            if isinstance(verdict.match, str):
                self._logprobs = _within(self._logprobs, len(verdict.text))
            return self._chunk(verdict.text, cached, FinishReason.STOP, verdict.match)
        if last:
            return self.finish(FinishReason.LENGTH, cached, verdict.text)
        if not verdict.text:
            return None
        return self._chunk(verdict.text, cached)

    def hand_over(self, chunk: Chunk | None, cached: int) -> Chunk:
        """End a sequence whose text goes on elsewhere: what is held back there is not told here."""
        return msgspec.structs.replace(chunk or self._chunk("", cached), finish=FinishReason.LENGTH)

    def finish(self, reason: FinishReason, cached: int, text: str = "") -> Chunk:
        """End the sequence, sending `text` and what was held back; a late stop still counts."""
        verdict = self._stops.finish(self._stream.finish())
        if verdict.stopped:
            reason = FinishReason.STOP
            self._logprobs = _within(self._logprobs, len(text) + len(verdict.text))
        return self._chunk(text + verdict.text, cached, reason, verdict.match)

    def _chunk(
        self,
        text: str,
        cached: int,
        finish: FinishReason | None = None,
        match: str | int | None = None,
    ) -> Chunk:
        first, self._first = self._first, False
        chunk = Chunk(
            index=self._index,
            text=text,
            token_ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self.prompt.result() if first and self.prompt is not None else None,
            finish=finish,
            stop_match=match,
            cached_tokens=cached,
        )
        self._ids.clear()
        self._logprobs.clear()
        return chunk

    def _named(self, scores: TokenScores) -> TokenLogprob:
        text = self._text.token_text
        top = tuple((i, text(i), value) for i, value in scores.top)
        return TokenLogprob(scores.token_id, text(scores.token_id), scores.logprob, top)


def _within(logprobs: list[TokenLogprob], length: int) -> list[TokenLogprob]:
    """Return the entries within `length` characters: the others are part of a stop string."""
    kept = []
    for entry in logprobs:
        length -= len(entry.text)
        if length < 0:
            break
        kept.append(entry)
    return kept
