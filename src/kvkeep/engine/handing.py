"""Requests whose prompt one engine computes and whose answer another goes on with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from kvkeep.engine import messages as m
from kvkeep.engine.api import FinishReason, GenerateRequest, TokenLogprob
from kvkeep.engine.sampling import TokenScores
from kvkeep.engine.sequence import Request
from kvkeep.engine.stats import EngineCounters


def awaits(spec: GenerateRequest) -> bool:
    """Tell whether a request's first token comes from another engine."""
    return spec.handover is not None and spec.handover.role == "decode"


def stands_by(request: Request) -> bool:
    """Tell whether another engine answers a request, unless it can't: nothing is done here."""
    handover = request.spec.handover
    return request.awaits and handover is not None and not handover.link


def hands_over(request: Request) -> bool:
    """Tell whether a request ends here with its first token."""
    handover = request.spec.handover
    return handover is not None and handover.role == "prefill"


def begin(
    request: Request,
    handed: m.Begin,
    counters: EngineCounters,
    end: Callable[[Request, FinishReason], None],
) -> None:
    """Put a request where the other engine stands, as if it had been preempted there.

    Its client knows what was told: of the text only what the other engine held back is told here.
    What the other engine told counts here, unless it did before, and what that ended ends here.
    """
    if not request.awaits:
        return
    request.awaits = False
    (sequence,) = request.sequences
    if handed.token_ids:
        request.first_token_s = now = time.monotonic()
        if not handed.counted:
            counters.ttft.add(now - request.arrived_s)
            counters.generated_tokens += len(handed.token_ids)
    for token, told in itertools.zip_longest(handed.token_ids, handed.logprobs):
        sequence.tokens.append(token)
        sequence.sampling.accept(token)
        sequence.generated += 1
        last = sequence.generated >= request.spec.params.max_tokens
        chunk = sequence.output.push(token, None if told is None else _scores(told), 0, last=last)
        if chunk is not None and chunk.finish is not None:
            end(request, chunk.finish)
            return


def _scores(told: TokenLogprob) -> TokenScores:
    top = tuple((token, value) for token, _, value in told.top)
    return TokenScores(told.token_id, told.logprob, top)
