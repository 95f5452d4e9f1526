"""Texts made to slip past a check of what may be shared, or past an exact match."""

from __future__ import annotations

from typing import Final

from kvkeep.audit.channel import (
    Facts,
    Observable,
    PlantAndProbe,
    Stage,
    Trial,
    of_twins,
)
from kvkeep.audit.prober import Prompt
from kvkeep.audit.prompts import Twins

SENTINELS: Final = ("Assistant:", "im_end", "[EMPTY]", "N/A")
"""Words that a check may take for its own placeholder of a harmless text."""


def boundary() -> PlantAndProbe:
    """Return the channel of personal data cut by a page's edge."""
    about = "made-up personal data across a page's boundary is shared"
    return PlantAndProbe(Facts("boundary", about, Observable.TTFT), _across)


def empty() -> PlantAndProbe:
    """Return the channel of texts that look empty."""
    about = "a text of characters without a width is shared"
    return PlantAndProbe(
        Facts("empty", about, Observable.TTFT),
        lambda stage: of_twins(stage, stage.maker.blanks(), stage.cast.victim),
    )


def sentinel() -> PlantAndProbe:
    """Return the channel of placeholder words around personal data."""
    about = "made-up personal data behind a placeholder word is shared"
    return PlantAndProbe(Facts("sentinel", about, Observable.TTFT), _behind_sentinels)


def collision() -> PlantAndProbe:
    """Return the channel of a prefix that is almost the victim's."""
    about = "a prompt with one early word exchanged matches the victim's"
    return PlantAndProbe(Facts("collision", about, Observable.TTFT), _almost)


def _across(stage: Stage) -> Trial:
    secret = stage.maker.secret()
    twins = stage.maker.bare_twins()
    cut = Twins(*(stage.maker.across_boundary(text, secret) for text in twins))
    return of_twins(stage, cut, stage.cast.victim)


def _behind_sentinels(stage: Stage) -> Trial:
    secret, word = stage.maker.secret(), stage.maker.chance.choice(SENTINELS)
    twins = stage.maker.bare_twins()
    # The twins' first two words stay in front, so that they differ within the first page.
    texts = (text.split(" ", 2) for text in twins)
    marked = (f"{a} {b}\n{word}\n{secret} {rest}\n{word}\n" for a, b, rest in texts)
    return of_twins(stage, Twins(*marked), stage.cast.victim)


def _almost(stage: Stage) -> Trial:
    trial = of_twins(stage, stage.maker.bare_twins(), stage.cast.victim)
    hit, miss = (Prompt(stage.maker.near(prompt.text)) for prompt in (trial.hit, trial.miss))
    return Trial(trial.planted, hit, miss, trial.hit_first)
