"""The count of cached tokens in a reply: an oracle without noise, where a target reports it."""

from __future__ import annotations

from kvkeep.audit.channel import Facts, Observable, PlantAndProbe, Stage, Trial, of_twins
from kvkeep.audit.prober import Prompt, Reply

FACTS = Facts(
    "cached_tokens",
    "usage.prompt_tokens_details.cached_tokens counts what the victim sent",
    Observable.CACHED_TOKENS,
    "tokens",
)


def cached_tokens() -> PlantAndProbe:
    """Return the channel: the victim sends, the attacker reads the count."""
    return PlantAndProbe(FACTS, lambda stage: _trial(stage, own=False), uncached, _reported)


def own_cached_tokens() -> PlantAndProbe:
    """Return the control: the attacker reads the count of its own."""
    return PlantAndProbe(FACTS, lambda stage: _trial(stage, own=True), uncached)


def uncached(reply: Reply) -> float:
    """Return the negated count, so that small means cached."""
    return -float(reply.cached_tokens or 0)


def _trial(stage: Stage, *, own: bool) -> Trial:
    planter = stage.cast.attacker if own else stage.cast.victim
    return of_twins(stage, stage.maker.twins(), planter)


async def _reported(stage: Stage) -> str | None:
    prompt = Prompt(stage.maker.text())
    await stage.prober.ask(stage.cast.attacker, prompt)
    reply = await stage.prober.ask(stage.cast.attacker, prompt)
    return None if reply.cached_tokens is not None else "the target does not report the count"
