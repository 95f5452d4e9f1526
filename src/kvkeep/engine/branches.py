"""One request's beams on sequences of the engine: scored together, reordered by forking views.

    step     every beam's sequence computes one row, as anybody's does
    take     the row's best next tokens are noted
    advance  once all beams have theirs: beams that go on stay where they are, second children take
             the places of beams that ended, with a fork of their parent's view

A sequence that was preempted meanwhile lets the others wait. They wait without a view, so that it
has room to come back; what they had computed stays cached.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from kvkeep.engine.api import Chunk, FinishReason
from kvkeep.engine.beams import BeamSearch, Hypothesis, Ranked, places
from kvkeep.engine.held import GOOD, BestOf, Held, failures, joined, told
from kvkeep.engine.output import OutputFactory
from kvkeep.engine.sampling import Sampler
from kvkeep.engine.scheduler import Scheduler
from kvkeep.engine.sequence import Request, Sequence


class Beams:
    """The beams of one request; the request's first sequence carries the first of them."""

    def __init__(self, search: BeamSearch, root: Sequence, outputs: OutputFactory) -> None:
        self.search = search
        self._root = root
        self._outputs = outputs
        self._carriers = [root]
        """The sequence of each beam, best first."""
        self._ranked: dict[Sequence, Ranked] = {}
        self._failure: Chunk | None = None

    def take(self, sequence: Sequence, logits: torch.Tensor, sampler: Sampler) -> None:
        """Note what may follow a beam, from its row of logits [V].

        Raises `EngineError` where they are not finite.
        """
        self._ranked[sequence] = sampler.rank(logits, self.search.wanted)

    def advance(
        self, scheduler: Scheduler, new_sequence: Callable[[Request, int, int], Sequence]
    ) -> int:
        """Let the beams grow by a token if all have been scored; return the tokens generated."""
        if len(self._ranked) < len(self._carriers):
            for sequence in self._ranked:
                scheduler.park(sequence)
            return 0
        before = self.search.generated
        self.search.advance([self._ranked[sequence] for sequence in self._carriers])
        self._ranked.clear()
        if self.search.beams:
            self._reorder(scheduler, new_sequence)
        return self.search.generated - before

    def add(self, chunk: Chunk) -> None:
        """Hear how a sequence ended: a failure is the request's, else the search has ended."""
        if chunk.finish not in GOOD:
            self._failure = self._failure or chunk
        else:
            self.search.close()

    def result(self) -> list[Chunk]:
        """Return the best texts."""
        request = self._root.request
        n, cached = request.spec.params.n, request.cached_tokens or 0
        if self._failure is not None:
            return failures(self._failure, n)
        best = [self._written(i, kept) for i, kept in enumerate(self.search.kept[:n])]
        short = Chunk(finish=FinishReason.LENGTH, cached_tokens=cached)
        best += failures(short, n - len(best))
        first = self._root.output.prompt
        scored = Chunk(prompt_logprobs=None if first is None else first.result())
        return told(best, self.search.generated, scored)

    def _reorder(
        self, scheduler: Scheduler, new_sequence: Callable[[Request, int, int], Sequence]
    ) -> None:
        """Give every beam a sequence that stands where its parent stood, and its last token."""
        request, old = self._root.request, self._carriers
        parents = [beam.parent for beam in self.search.beams]
        taken = places(parents, len(old))
        for place in sorted(set(range(len(old))) - set(parents)):
            scheduler.vacate(old[place])
        self._carriers = []
        for place, parent in zip(taken, parents, strict=True):
            if place < len(old):
                sequence = old[place]
            else:
                index = len(request.sequences)
                sequence = new_sequence(request, index, self._root.sampling.seed)
                request.sequences.append(sequence)
            if place == parent:
                scheduler.resume(sequence)
            else:
                sequence.tokens = old[parent].tokens.copy()
                scheduler.follow(sequence, old[parent])
            self._carriers.append(sequence)
        for place in sorted(set(range(len(old))) - set(taken)):
            scheduler.remove(old[place])
        for sequence, beam in zip(self._carriers, self.search.beams, strict=True):
            sequence.tokens.append(beam.tokens[-1].token_id)
            sequence.generated = len(beam.tokens)

    def _written(self, index: int, kept: Hypothesis) -> Chunk:
        """Return a text as the chunk of one sequence."""
        spec = self._root.request.spec
        output = self._outputs.sequence(spec, index)
        output.prompt = None
        scored, cached = spec.params.logprobs is not None, self._root.request.cached_tokens or 0
        chunks = []
        for place, token in enumerate(kept.tokens, 1):
            last = place == len(kept.tokens)
            chunk = output.push(token.token_id, token if scored else None, cached, last=last)
            if chunk is not None:
                chunks.append(chunk)
        return msgspec.structs.replace(joined(chunks), score=kept.score)


def held_of(request: Request, outputs: OutputFactory, max_model_len: int) -> Held | None:
    """Return where a request's chunks wait for their ranking, if it asks for one."""
    spec = request.spec
    if not spec.params.ranks:
        return None
    if not spec.params.use_beam_search:
        return BestOf(spec.params.n)
    search = outputs.search(spec, max_model_len - len(spec.prompt_ids))
    return Beams(search, request.sequences[0], outputs)
