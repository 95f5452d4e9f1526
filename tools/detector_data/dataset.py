"""What the scorer trains on: passages of the training world, varied, and real prose."""

from __future__ import annotations

import random
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tools.detector_data.passages import KINDS, LANGUAGES, LIMIT, SPACELESS, Passage, World

PROSE: Final = "prose"
"""The target of real text."""
PROMPT: Final = "prompt"
"""The target of a part of a public prompt."""
LOWERED: Final = 0.12
RAISED: Final = 0.02
IN_PROSE: Final = 0.2
BARE: Final = 0.2
"""Shares of positives that are lower-cased, upper-cased, set amid real prose, or there alone."""
MIXED: Final = 0.05
"""Share of passages beside a lookalike of another language."""
MISTYPED: Final = 0.06
UNACCENTED: Final = 0.04
QUOTED: Final = 0.05
"""Shares of passages with wrong letters, without accents, inside a message's JSON."""
QUOTES: Final = (
    ('{"role": "user", "content": "', '"}'),
    ('{"text": "', '"}'),
    ("<|user|>\n", "\n<|assistant|>"),
    ("```\n", "\n```"),
    ("> ", ""),
    ('"', '"'),
    ("(", ")"),
)
ANYWHERE: Final = frozenset(
    {"person_name", "address", "diagnosis", "medication", "employer", "email", "api_key", "jwt"}
)
"""Kinds whose values tell what they are without a word around them."""


FORMED: Final = 4
"""Passages of a kind with a form are so many times fewer: rules own them."""


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


def _set_in(passage: Passage, before: str, after: str) -> Passage:
    """Return a passage between two texts, itself where that is too long."""
    text = f"{before}{passage.text}{after}"
    if len(text) > LIMIT:
        return passage
    labels = tuple(
        label._replace(start=label.start + len(before), end=label.end + len(before))
        for label in passage.labels
    )
    return replace(passage, text=text, labels=labels)


def _mistyped(passage: Passage, rng: random.Random) -> Passage:
    """Return a passage with one to three letters exchanged or doubled over their neighbours."""
    text = list(passage.text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(len(text) - 1, 1))
        if text[at : at + 2] and all(c.isalpha() for c in text[at : at + 2]):
            text[at : at + 2] = reversed(text[at : at + 2]) if rng.random() < 0.5 else text[at] * 2
    return replace(passage, text="".join(text))


def _unaccented(passage: Passage) -> Passage:
    """Return a passage whose Latin letters have no marks."""
    plain = (unicodedata.normalize("NFD", c)[0] if c < "\u0250" else c for c in passage.text)
    return replace(passage, text="".join(plain))


def roughened(passage: Passage, rng: random.Random) -> Passage:
    """Return a passage as it may come through keyboards and programs."""
    if rng.random() < MISTYPED:
        passage = _mistyped(passage, rng)
    if rng.random() < UNACCENTED:
        passage = _unaccented(passage)
    if rng.random() < QUOTED:
        passage = _set_in(passage, *rng.choice(QUOTES))
    return passage


def varied(passage: Passage, prose: Sequence[str], rng: random.Random) -> Passage:
    """Return a passage as carelessly written, or amid other text, or as it is."""
    passage = roughened(passage, rng)
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
    """Yield passages of every kind in every language that has it, most of those without a form.

    Where every character is a token there are half as many again: more of them have to be learned.
    """
    for lang in LANGUAGES:
        for slot, kind in KINDS.items():
            spoken = kind.free_text or slot == "password"
            wanted = count * 3 // 2 if lang in SPACELESS else count
            yield from world.positives(lang, slot, wanted if spoken else wanted // FORMED + 1)


def _beside(passage: Passage, others: Sequence[Passage], rng: random.Random) -> Passage:
    """Return a passage after a lookalike of any language."""
    return _set_in(passage, f"{rng.choice(others).text}\n", "")


def passages(
    world: World, prose: Mapping[str, Sequence[str]], sizes: Sizes, seed: int
) -> Iterator[Passage]:
    """Yield a set of passages, varied; the same for one seed."""
    rng = random.Random(seed)
    plain = [one for lang in LANGUAGES for one in world.negatives(lang, sizes.negatives)]
    for passage in positives(world, sizes.positives):
        made = varied(passage, prose[passage.lang], rng)
        yield _beside(made, plain, rng) if rng.random() < MIXED else made
    for passage in plain:
        made = varied(passage, (), rng)
        yield _beside(made, plain, rng) if rng.random() < MIXED else made
    for lang in LANGUAGES:
        yield from (Passage(text, lang, target=PROSE) for text in prose[lang][: sizes.prose])


def prompt_parts(path: Path) -> Iterator[Passage]:
    """Yield the parts of public prompts that a file lists, each cut to what a passage may hold."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    for part in (part for parts in tables.values() for part in parts):
        for at in range(0, len(part), LIMIT):
            yield Passage(part[at : at + LIMIT], "en", target=PROMPT)
