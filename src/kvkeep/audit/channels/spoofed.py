"""Who one says one is: headers and fields that name the victim, its salt, or no key at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from kvkeep.audit.target import Account

HEADERS: Final = (
    "X-Kvkeep-Tenant",
    "X-Kvkeep-Subject",
    "X-Tenant-Id",
    "X-User-Id",
    "X-Forwarded-User",
    "X-Forwarded-For",
    "X-Real-IP",
    "OpenAI-Organization",
    "OpenAI-Project",
)
FIELDS: Final = ("user", "user_id", "tenant", "safety_identifier", "prompt_cache_key")
SALT: Final = "cache_salt"
NOBODY: Final = Account("nobody", "")


class Spoofed:
    """Asks in the victim's name, with whatever of it the target takes."""

    def __init__(
        self, facts: Facts, *, headers: Sequence[str] = (), fields: Sequence[str] = ()
    ) -> None:
        self._headers = headers
        self._fields = fields
        self._inner = PlantAndProbe(facts, self._trial)
        self._taken = Prompt("")

    @property
    def facts(self) -> Facts:
        """Return what the channel is."""
        return self._inner.facts

    async def prepare(self, stage: Stage) -> str | None:
        """Find out what the target takes; return a reason where it refuses everything."""
        name = stage.cast.victim.name
        tried = [Prompt("", headers=((h, name),)) for h in self._headers]
        tried += [Prompt("", fields=((f, name),)) for f in self._fields]
        taken = []
        for one in tried:
            prompt = replace(one, text=stage.maker.text())
            if await stage.prober.accepts(stage.cast.attacker, prompt):
                taken.append(one)
        self._taken = Prompt(
            "",
            headers=tuple(pair for one in taken for pair in one.headers),
            fields=tuple(pair for one in taken for pair in one.fields),
        )
        return None if taken else "the target refuses every one of them"

    def plan(self, stage: Stage, count: int) -> Sequence[Trial]:
        """Return trials asked in the victim's name."""
        return self._inner.plan(stage, count)

    async def run(self, stage: Stage, trials: Sequence[Trial]) -> Sequence[Pair]:
        """Plant and probe."""
        return await self._inner.run(stage, trials)

    def score(self, pairs: Sequence[Pair], control: Sequence[Pair]) -> Mapping[str, float]:
        """Return how many names were taken."""
        return {"names_taken": float(len(self._taken.headers) + len(self._taken.fields))}

    def _trial(self, stage: Stage) -> Trial:
        trial = of_twins(stage, stage.maker.twins(), stage.cast.victim)
        hit, miss = (replace(self._taken, text=prompt.text) for prompt in (trial.hit, trial.miss))
        # A salt is the victim's own: it sends what the attacker found out.
        salts = tuple(pair for pair in self._taken.fields if pair[0] == SALT)
        planted = Sending(stage.cast.victim, replace(trial.hit, fields=salts))
        return Trial((planted,), hit, miss, trial.hit_first)


def spoofed_headers() -> Spoofed:
    """Return the channel of headers that name the victim."""
    about = "headers that name the victim open its entries"
    return Spoofed(Facts("spoofed_headers", about, Observable.TTFT), headers=HEADERS)


def spoofed_fields() -> Spoofed:
    """Return the channel of body fields that name the victim."""
    about = "fields of the body that name the victim open its entries"
    return Spoofed(Facts("spoofed_fields", about, Observable.TTFT), fields=FIELDS)


def spoofed_salt() -> Spoofed:
    """Return the channel of the victim's salt, known to the attacker."""
    about = "the victim's cache_salt opens its entries"
    return Spoofed(Facts("spoofed_salt", about, Observable.TTFT), fields=(SALT,))


def no_key() -> PlantAndProbe:
    """Return the channel of requests without a key."""
    about = "a request without a key reads the victim's entries"
    return PlantAndProbe(
        Facts("no_key", about, Observable.TTFT),
        lambda stage: of_twins(stage, stage.maker.twins(), stage.cast.victim),
        ready=_served,
        asker=NOBODY,
    )


async def _served(stage: Stage) -> str | None:
    served = await stage.prober.accepts(NOBODY, Prompt(stage.maker.text()))
    return None if served else "the target refuses a request without a key"
