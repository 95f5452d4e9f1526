"""The training world in two that share no template and no listed value, and values made of others.

Thresholds are set on the second half, so that they hold for wording and values not trained on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from tools.detector_data.passages import Language, World

SHARE: Final = 0.15
"""Of templates and values that go to validation."""
FEWEST: Final = 8
"""A shorter list stays whole on both sides: it is a pattern's or a closed one."""
CROSSED: Final = (
    *("given", "family", "city", "street", "employer", "medication", "diagnosis", "prodname"),
    *("brand", "tree", "stem", "stname", "pwword", "pub", "town", "bigco"),
)
"""Slots whose values are also crossed with each other."""
CROSSES: Final = 400


class Split(NamedTuple):
    """Two worlds."""

    training: World
    validation: World


def crossed(values: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return new values: the beginning of one and the end of another."""
    plain = [value for value in values if "<" not in value and len(value) > 1]
    found = []
    for _ in range(count if len(plain) > 1 else 0):
        head, tail = rng.sample(plain, 2)
        if " " in head and " " in tail:
            words, others = head.split(), tail.split()
            found.append(" ".join((*words[: (len(words) + 1) // 2], *others[len(others) // 2 :])))
        else:
            cut, other = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)
            joined = head[: max(1, round(len(head) * cut))] + tail[round(len(tail) * other) :]
            found.append(joined)
    return found


def _parted(items: Sequence[str], rng: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the two sides of a list."""
    order = list(items)
    rng.shuffle(order)
    cut = round(len(order) * SHARE)
    return tuple(order[cut:]), tuple(order[:cut])


def _values(
    values: Mapping[str, Sequence[str]], rng: random.Random
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Return the two sides of all lists; patterns stay on both."""
    ours: dict[str, tuple[str, ...]] = {}
    theirs: dict[str, tuple[str, ...]] = {}
    for slot, listed in values.items():
        patterns = tuple(value for value in listed if "<" in value)
        plain = list(dict.fromkeys(value for value in listed if "<" not in value))
        if len(plain) < FEWEST:
            ours[slot] = theirs[slot] = tuple(listed)
            continue
        kept, held = _parted(plain, rng)
        made = crossed(kept, min(CROSSES, 2 * len(kept)), rng) if slot in CROSSED else []
        ours[slot] = (*patterns, *kept, *(value for value in made if value not in held))
        theirs[slot] = (*patterns, *held)
    return ours, theirs


def split(world: World, seed: int) -> Split:
    """Return a world's two sides."""
    sides: tuple[dict[str, Language], dict[str, Language]] = ({}, {})
    for lang, language in world.languages.items():
        rng = random.Random(f"{seed}/{lang}")
        positive, negative = _parted(language.positive, rng), _parted(language.negative, rng)
        values = _values(language.values, rng)
        for side in (0, 1):
            sides[side][lang] = replace(
                language, values=values[side], positive=positive[side], negative=negative[side]
            )
    return Split(World(sides[0], seed), World(sides[1], seed + 1))
