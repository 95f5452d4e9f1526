"""What the scorer trains on: passages of the training world, varied, and real prose."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tools.detector_data.passages import KINDS, LANGUAGES, LIMIT, SPACELESS, Passage, World

PROSE: Final = "prose"
"""The target of real text."""
LOWERED: Final = 0.12
RAISED: Final = 0.02
IN_PROSE: Final = 0.25
BARE: Final = 0.15
"""Shares of positives that are lower-cased, upper-cased, set amid real prose, or there alone."""
ANYWHERE: Final = frozenset(
    {"person_name", "address", "diagnosis", "medication", "employer", "email", "api_key", "jwt"}
)
"""Kinds whose values tell what they are without a word around them."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Passages per language: of each kind, of lookalikes, and of real prose."""

    positives: int
    negatives: int
    prose: int


def _cased(passage: Passage, text: str) -> Passage:
    """Return a passage in another case; unchanged where that moves offsets."""
    return replace(passage, text=text) if len(text) == len(passage.text) else passage


def _amid(passage: Passage, prose: Sequence[str], rng: random.Random) -> Passage:
    """Return a passage between two pieces of real prose."""
    room = LIMIT - len(passage.text) - 2
    other = rng.choice(prose)
    start = rng.randint(0, max(len(other) - room, 0))
    piece = other[start : start + max(room, 0)]
    cut = piece.rfind("\n", 0, rng.randint(0, len(piece))) + 1
    before = piece[:cut]
    shift = len(before)
    labels = tuple(
        label._replace(start=label.start + shift, end=label.end + shift) for label in passage.labels
    )
    return replace(passage, text=f"{before}{passage.text}\n{piece[cut:]}", labels=labels)


def _bare(passage: Passage, prose: Sequence[str], rng: random.Random) -> Passage:
    """Return the first label's text alone, set into real prose between two words."""
    label = passage.labels[0]
    value = passage.text[label.start : label.end]
    other = rng.choice(prose)[: LIMIT - len(value) - 2]
    gaps = [at for at, c in enumerate(other) if c in " \n"] or [0]
    if passage.lang in SPACELESS:
        gaps = list(range(len(other)))
    at = rng.choice(gaps)
    joint = "" if passage.lang in SPACELESS else " "
    text = f"{other[:at]}{joint}{value}{joint}{other[at:].lstrip()}"
    start = at + len(joint)
    return replace(
        passage, text=text, labels=(label._replace(start=start, end=start + len(value)),)
    )


def varied(passage: Passage, prose: Sequence[str], rng: random.Random) -> Passage:
    """Return a passage as carelessly written, or amid other text, or as it is."""
    if rng.random() < LOWERED:
        passage = _cased(passage, passage.text.lower())
    elif rng.random() < RAISED:
        passage = _cased(passage, passage.text.upper())
    if prose and passage.labels and passage.labels[0].kind in ANYWHERE and rng.random() < BARE:
        passage = _bare(passage, prose, rng)
    elif prose and rng.random() < IN_PROSE:
        passage = _amid(passage, prose, rng)
    return passage


def positives(world: World, count: int) -> Iterator[Passage]:
    """Yield the same number of passages of every kind in every language that has it."""
    for lang in LANGUAGES:
        for slot in KINDS:
            yield from world.positives(lang, slot, count)


def passages(
    world: World, prose: Mapping[str, Sequence[str]], sizes: Sizes, seed: int
) -> Iterator[Passage]:
    """Yield a set of passages, varied; the same for one seed."""
    rng = random.Random(seed)
    for passage in positives(world, sizes.positives):
        yield varied(passage, prose[passage.lang], rng)
    for lang in LANGUAGES:
        for passage in world.negatives(lang, sizes.negatives):
            yield varied(passage, (), rng)
        yield from (Passage(text, lang, target=PROSE) for text in prose[lang][: sizes.prose])
