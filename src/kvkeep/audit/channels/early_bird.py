"""Early Bird's token recovery (arXiv 2409.20002): a known template, a guess, n = 10 looks, k = 5.

Ten documents hold one bit of the victim's, each under a relabelling that the attacker knows. For
each of the two values it asks for ten prompts and counts those that answer below a limit, taken
anew from requests whose answer it knows; the value with k or more is taken. A group is recovered
when the right value has k and the wrong one has not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from statistics import median
from typing import Final

from kvkeep.audit.channel import (
    Facts,
    Observable,
    Pair,
    PlantAndProbe,
    Sending,
    Stage,
    Trial,
    of_twins,
)
from kvkeep.audit.prober import Prompt
from kvkeep.audit.prompts import Twins
from kvkeep.audit.target import Account

LOOKS: Final = 10
NEEDED: Final = 5
KNOWN: Final = 8
"""Pairs of own requests, the latest, that the limit is taken from; one is added every run."""
REQUESTS_PER_LOOK: Final = 2


class EarlyBird:
    """Guesses what follows a template, and keeps its limit up to date."""

    def __init__(self) -> None:
        about = "tokens after a known template are recovered by guessing (n = 10, k = 5)"
        self._inner = PlantAndProbe(Facts("early_bird", about, Observable.TTFT), guess)
        self._own = PlantAndProbe(self._inner.facts, _own_guess)
        self._known: deque[Pair] = deque(maxlen=KNOWN)
        self._limits: list[float] = []

    @property
    def facts(self) -> Facts:
        """Return what the channel is."""
        return self._inner.facts

    async def prepare(self, stage: Stage) -> str | None:
        """Need nothing."""
        return None

    def plan(self, stage: Stage, count: int) -> Sequence[Trial]:
        """Return guesses."""
        return self._inner.plan(stage, count)

    async def run(self, stage: Stage, trials: Sequence[Trial]) -> Sequence[Pair]:
        """Plant and probe, then look at what own right and wrong guesses take now."""
        found = await self._inner.run(stage, trials)
        self._known += await self._own.run(stage, self._own.plan(stage, 1))
        self._limits += [middle(self._known) if self._known else -inf] * len(found)
        return found

    def score(self, pairs: Sequence[Pair], control: Sequence[Pair]) -> Mapping[str, float]:
        """Return the share of groups recovered and what a recovered token costs."""
        return recovery(pairs, self._limits)


def middle(pairs: Iterable[Pair]) -> float:
    """Return the middle between what hits and misses took."""
    known = list(pairs)
    return (median(pair.hit for pair in known) + median(pair.miss for pair in known)) / 2


def recovery(pairs: Sequence[Pair], limits: Sequence[float]) -> Mapping[str, float]:
    """Return shares of groups, and requests per recovered token, under a limit for each pair."""
    seen = [
        (pair.hit < limit, pair.miss < limit) for pair, limit in zip(pairs, limits, strict=True)
    ]
    groups = [seen[i : i + LOOKS] for i in range(0, len(seen) - LOOKS + 1, LOOKS)]
    if not groups:
        return {}
    right = [sum(hit for hit, _ in group) >= NEEDED for group in groups]
    wrong = [sum(miss for _, miss in group) >= NEEDED for group in groups]
    recovered = sum(r and not w for r, w in zip(right, wrong, strict=True))
    found = {
        "groups": float(len(groups)),
        "recovered_share": recovered / len(groups),
        "wrong_taken_share": sum(wrong) / len(groups),
    }
    if recovered:
        found["requests_per_recovered"] = REQUESTS_PER_LOOK * LOOKS * len(groups) / recovered
    return found


def guess(stage: Stage) -> Trial:
    """Return a trial of two texts that follow a template which the attacker holds already."""
    return _after_template(stage, stage.cast.victim)


def _own_guess(stage: Stage) -> Trial:
    return _after_template(stage, stage.cast.attacker)


def _after_template(stage: Stage, planter: Account) -> Trial:
    half = stage.maker.words // 2
    template = stage.maker.template(half)
    guesses = Twins(*(f"{template} {rest}" for rest in stage.maker.guesses(half)))
    trial = of_twins(stage, guesses, planter)
    known = Sending(stage.cast.attacker, Prompt(template))
    return Trial((known, *trial.planted), trial.hit, trial.miss, trial.hit_first)
