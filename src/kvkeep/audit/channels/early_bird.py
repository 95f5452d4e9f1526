"""Early Bird's token recovery (arXiv 2409.20002): a known template, a guess, n = 10 looks, k = 5.

Ten documents hold one bit of the victim's, each under a relabelling that the attacker knows. For
each of the two values it asks for ten prompts and counts those that answer below a threshold
calibrated on prompts of its own; the value with k or more is taken. A group is recovered when the
right value has k and the wrong one has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

LOOKS: Final = 10
NEEDED: Final = 5
REQUESTS_PER_LOOK: Final = 2

FACTS = Facts(
    "early_bird",
    "tokens after a known template are recovered by guessing (n = 10, k = 5)",
    Observable.TTFT,
)


def early_bird() -> PlantAndProbe:
    """Return the channel."""
    return PlantAndProbe(FACTS, _trial, figures=recovery)


def threshold_of(control: Sequence[Pair]) -> float:
    """Return the middle between what own hits and own misses took."""
    return sum(_medians(control)) / 2


def recovery(pairs: Sequence[Pair], control: Sequence[Pair]) -> Mapping[str, float]:
    """Return the share of groups recovered and of wrong values taken, and what a token costs."""
    groups = [pairs[i : i + LOOKS] for i in range(0, len(pairs) - LOOKS + 1, LOOKS)]
    if not groups or not control:
        return {}
    hit, miss = _medians(control)
    # A wrong guess still finds the template, half of the prompt: the limit lies halfway to that.
    limit = hit + (miss - hit) / 4
    right = [sum(pair.hit < limit for pair in group) >= NEEDED for group in groups]
    wrong = [sum(pair.miss < limit for pair in group) >= NEEDED for group in groups]
    recovered = sum(r and not w for r, w in zip(right, wrong, strict=True))
    found = {
        "groups": float(len(groups)),
        "recovered_share": recovered / len(groups),
        "wrong_taken_share": sum(wrong) / len(groups),
    }
    if recovered:
        found["requests_per_recovered"] = REQUESTS_PER_LOOK * LOOKS * len(groups) / recovered
    return found


def _medians(control: Sequence[Pair]) -> tuple[float, float]:
    return median(pair.hit for pair in control), median(pair.miss for pair in control)


def _trial(stage: Stage) -> Trial:
    half = stage.maker.words // 2
    template = stage.maker.template(half)
    guesses = Twins(*(f"{template} {rest}" for rest in stage.maker.guesses(half)))
    trial = of_twins(stage, guesses, stage.cast.victim)
    # The attacker holds the template already, so that both of its guesses start from it.
    known = Sending(stage.cast.attacker, Prompt(template))
    return Trial((known, *trial.planted), trial.hit, trial.miss, trial.hit_first)
