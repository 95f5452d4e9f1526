"""Planted recall probes: what a prompt said long ago, asked again once tokens were evicted."""

from __future__ import annotations

from typing import Final

import msgspec

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.guard import Guard, Ticket, draw
from kvkeep.engine.led_guard import LedGuard
from kvkeep.engine.sequence import Request

CUE_TOKENS: Final = 8
"""Of the passage: they tell where it comes from, and are not asked for."""
PASSAGE_TOKENS: Final = 32


def probe_id(request_id: str) -> str:
    """Return the id of the probe beside a request."""
    return f"{request_id}/recall"


def probe_beside(request: Request, guard: Guard | LedGuard, max_tokens: int) -> Request | None:
    """Return a request for the same prompt and then a passage of it again, beside a sampled one.

    The passage comes from before the rows that are observed, from a place drawn for the request.
    None where none is sampled, nothing is evicted, or all would be longer than `max_tokens`.
    """
    spec, watch, sample = request.spec, request.watch, request.sample
    length = len(spec.prompt_ids) + PASSAGE_TOKENS
    if sample is None or watch is None or length > max_tokens:
        return None
    places = min(watch.first, watch.prompt_tokens) - 2 * PASSAGE_TOKENS
    if places <= 0:
        return None
    begin = int(draw(sample.tenant, sample.number, b"passage") * places)
    params = SamplingParams(max_tokens=PASSAGE_TOKENS, temperature=0.0, ignore_eos=True)
    asked = msgspec.structs.replace(
        spec, id=probe_id(spec.id), params=params, store=False, deadline_s=None
    )
    return Request(
        asked,
        request.arrived_s,
        None,
        watch=watch,
        epoch=request.epoch,
        sample=guard.plant(Ticket(request.epoch, sample), length, PASSAGE_TOKENS),
        planted=spec.prompt_ids[begin : begin + PASSAGE_TOKENS],
    )
