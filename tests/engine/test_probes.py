"""Planted probes: a passage of a sampled request's prompt, from before what is observed."""

from __future__ import annotations

import pytest

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.guard import Guard, GuardLimits
from kvkeep.engine.probes import PASSAGE_TOKENS, probe_beside
from kvkeep.engine.sequence import Request
from kvkeep.eviction.corm import Corm, CormOptions
from kvkeep.sharing.state import NoStore
from tests.engines import request

EVICTOR = Corm(CormOptions(window=100, recent=50))


def sampled(guard: Guard, tokens: int) -> Request:
    spec = request(range(tokens), SamplingParams(n=3, max_tokens=9, temperature=0.7))
    made = Request(spec, 1.0, 2.0)
    made.watch = EVICTOR.watch(tokens)
    made.epoch, made.sample = guard.enter("a", 100, 4, can=True)
    return made


def guard_of() -> Guard:
    guard = Guard(GuardLimits(1.0, 4, 0.1), "kept", 1, NoStore())
    guard.asleep = False
    return guard


def test_a_passage_of_what_is_no_longer_looked_at_follows_the_prompt() -> None:
    guard = guard_of()
    begins = set()
    for _ in range(20):
        asked = sampled(guard, 400)
        probe = probe_beside(asked, guard, 10**4)
        assert probe is not None
        assert probe.spec.prompt_ids == asked.spec.prompt_ids
        begin = probe.planted[0]
        assert probe.planted == tuple(range(begin, begin + PASSAGE_TOKENS))
        assert begin + PASSAGE_TOKENS <= 300 - PASSAGE_TOKENS
        begins.add(begin)
        assert (probe.spec.store, probe.deadline_s, probe.epoch) == (False, None, asked.epoch)
        assert (probe.spec.params.width, probe.spec.params.temperature) == (1, 0.0)
        assert probe.sample is not None
        assert probe.sample.reserved_tokens == 400 + PASSAGE_TOKENS
    assert len(begins) > 10


@pytest.mark.parametrize("change", ["not sampled", "not evicting", "too long", "too short"])
def test_there_is_none_where_nothing_could_be_asked(change: str) -> None:
    guard = guard_of()
    asked = sampled(guard, 150 if change == "too short" else 400)
    if change == "not sampled":
        asked.sample = None
    if change == "not evicting":
        asked.watch = None
    assert probe_beside(asked, guard, 420 if change == "too long" else 10**4) is None
