"""Paired time to first token: the plain attack, and the control that shows a cache at all."""

from __future__ import annotations

from kvkeep.audit.channel import Facts, Observable, PlantAndProbe, Stage, Trial, of_twins

FACTS = Facts("ttft", "a prompt the victim sent answers sooner than a fresh one", Observable.TTFT)


def ttft() -> PlantAndProbe:
    """Return the channel: the victim sends, the attacker asks."""
    return PlantAndProbe(FACTS, lambda stage: _trial(stage, own=False))


def own_ttft() -> PlantAndProbe:
    """Return the control: the attacker asks for what it sent itself."""
    return PlantAndProbe(FACTS, lambda stage: _trial(stage, own=True))


def _trial(stage: Stage, *, own: bool) -> Trial:
    planter = stage.cast.attacker if own else stage.cast.victim
    return of_twins(stage, stage.maker.twins(), planter)
