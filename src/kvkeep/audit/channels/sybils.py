"""Accounts of the attacker's that vote for a prompt until the victim's own sending tips it."""

from __future__ import annotations

from kvkeep.audit.channel import (
    Facts,
    Observable,
    PlantAndProbe,
    Sending,
    Stage,
    Trial,
    of_twins,
)

FACTS = Facts(
    "sybils",
    "further accounts of the attacker's send both prompts before the victim sends one",
    Observable.TTFT,
)


def sybils() -> PlantAndProbe:
    """Return the channel; with k - 2 further keys it tests the promise of k at its edge."""
    return PlantAndProbe(FACTS, _trial, ready=_keys)


def _trial(stage: Stage) -> Trial:
    trial = of_twins(stage, stage.maker.twins(), stage.cast.victim)
    votes = tuple(
        Sending(account, prompt)
        for account in stage.cast.sybils
        for prompt in (trial.hit, trial.miss)
    )
    return Trial((*votes, *trial.planted), trial.hit, trial.miss, trial.hit_first)


async def _keys(stage: Stage) -> str | None:
    return None if stage.cast.sybils else "needs a third --key"
