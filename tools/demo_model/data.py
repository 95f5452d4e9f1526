"""Training samples: copying, documentation text, facts and tables with questions, conversations.

A sample is a row of ids and a row of weights: weights[i] is the loss weight of predicting ids[i].
Entities (phrases) and 4-digit codes whose hash falls in one eighth are held out for evaluation.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import NamedTuple

from tools.demo_model.words import (
    CITY_ENDS,
    CITY_STARTS,
    COLOURS,
    GREETINGS,
    INSTRUCTIONS,
    KEYS,
    NAMES,
    OBJECTS,
    PLACES,
    ROLES,
    SIDES,
)

END_OF_TEXT, END = "<|endoftext|>", "<|end|>"
SPECIALS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END)
ANSWER = 4.0  # weight of the tokens of an answer: also what marks them for scoring
FILLER, FRAME = 0.3, 0.1

Filler = Callable[[], str]


class Piece(NamedTuple):
    """A stretch of text whose tokens share a loss weight."""

    text: str
    weight: float


class Fact(NamedTuple):
    """One statement; the value starts with a space."""

    identity: str
    statement: str
    question: str
    value: str


class Scene(NamedTuple):
    """Whom and what facts are about."""

    place: str
    person: str


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    pieces: list[Piece]

    @property
    def content(self) -> str:
        """The text of the message."""
        return "".join(p.text for p in self.pieces)


def no_filler() -> str:
    """Nothing between the facts."""
    return ""


def is_held_out(phrase: str) -> bool:
    """Whether only evaluation may use this phrase."""
    return zlib.crc32(phrase.encode()) % 8 == 0


def code(rng: random.Random, held_out: bool) -> str:
    """Four digits from one side of the split."""
    while True:
        digits = f"{rng.randrange(10000):04d}"
        if is_held_out("code" + digits) == held_out:
            return digits


def phrase(rng: random.Random, *lists: tuple[str, ...]) -> str:
    """One word of each list."""
    return " ".join(rng.choice(words) for words in lists)


def any_scene(rng: random.Random) -> Scene:
    """A random place and person."""
    place = "the " + phrase(rng, SIDES, PLACES)
    return Scene(place, f"{phrase(rng, NAMES)} the {phrase(rng, ROLES)}")


def any_fact(rng: random.Random, held_out: bool, cast: list[Scene]) -> Fact:
    """A fact of one of four kinds, about the cast six times in ten if there is one.

    A code in it is on the asked side of the split.
    """
    kind = rng.randrange(4)
    place, person = any_scene(rng)
    if cast and rng.random() < 0.6:
        place, person = rng.choice(cast)
    if kind == 0:
        stem, ask = f"The access code of {place} is", f"What is the access code of {place}?"
        return Fact(place, stem, ask, " " + code(rng, held_out))
    if kind == 1:
        city = phrase(rng, CITY_STARTS) + phrase(rng, CITY_ENDS)
        return Fact(person, f"{person} lives in", f"Where does {person} live?", " " + city)
    if kind == 2:
        thing = phrase(rng, OBJECTS)
        stem, ask = f"The {thing} of {person} is", f"What colour is the {thing} of {person}?"
        return Fact(person + thing, stem, ask, " " + phrase(rng, COLOURS))
    name = phrase(rng, NAMES)
    stem, ask = f"The number of {name} at {place} is", f"What is the number of {name} at {place}?"
    return Fact(name + place, stem, ask, " " + code(rng, held_out))


def distinct_facts(
    rng: random.Random, count: int, held_out: bool, crowded: float = 0.0
) -> list[Fact]:
    """Different facts from one side of the split; a share `crowded` of the calls reuses a cast."""
    cast: list[Scene] = []
    if crowded and rng.random() < crowded:
        cast = [any_scene(rng) for _ in range(rng.randint(1, max(2, count // 4)))]
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        fact = any_fact(rng, held_out, cast)
        if is_held_out(fact.identity) == held_out:
            facts.setdefault(fact.identity, fact)
    return list(facts.values())


def stated(fact: Fact, filler: Filler) -> list[Piece]:
    """Filler, then the fact as a sentence."""
    return [
        Piece(filler(), FILLER),
        Piece(" " + fact.statement, FRAME),
        Piece(fact.value, 0.0),
        Piece(".", FRAME),
    ]


def asked(fact: Fact, rng: random.Random) -> list[Piece]:
    """A question in plain text; three in ten answers repeat the statement."""
    stem = " " + fact.statement if rng.random() < 0.3 else ""
    lead = Piece(f"\nQuestion: {fact.question} Answer:{stem}", 0.0)
    return [lead, Piece(fact.value, ANSWER), Piece(".", 0.2)]


def recall_text(
    rng: random.Random,
    count: int,
    filler: Filler,
    held_out: bool,
    questions: int | None = None,
    crowded: float = 0.0,
) -> list[Piece]:
    """Facts amid filler, with questions between them and `questions` (else all) at the end."""
    facts = distinct_facts(rng, count, held_out, crowded)
    out: list[Piece] = []
    for i, fact in enumerate(facts):
        out += stated(fact, filler)
        if rng.random() < 0.3:
            out += [*asked(rng.choice(facts[: i + 1]), rng), Piece("\n", FRAME)]
    out.append(Piece(filler(), FILLER))
    for fact in rng.sample(facts, len(facts))[:questions]:
        out += asked(fact, rng)
    return out


def table_rows(rng: random.Random, count: int, held_out: bool) -> dict[str, str]:
    """Keys of two words and values that start with a space."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        key = f"{rng.choice(KEYS)}_{rng.choice(KEYS)}"
        if is_held_out(key) == held_out and key not in rows:
            number = rng.random() < 0.6
            rows[key] = " " + (code(rng, held_out) if number else phrase(rng, COLOURS))
    return rows


def table_pieces(rows: dict[str, str]) -> list[Piece]:
    """The table as lines of `key: value`."""
    return [Piece("Table:", FRAME), *(Piece(f"\n{k}:{v}", 0.0) for k, v in rows.items())]


def table_text(rng: random.Random, count: int, held_out: bool) -> list[Piece]:
    """A table, then every key asked once."""
    rows = table_rows(rng, count, held_out)
    out = [*table_pieces(rows), Piece("\nLookup:", FRAME)]
    for key in rng.sample(list(rows), len(rows)):
        out += [Piece(f"\n{key}?", 0.0), Piece(rows[key], ANSWER)]
    return out


def chat_turns(
    rng: random.Random,
    count: int,
    filler: Filler,
    held_out: bool,
    questions: int | None = None,
    crowded: float = 0.0,
) -> list[Turn]:
    """A conversation over facts: context in the system or user message, a question per turn."""
    facts = distinct_facts(rng, count, held_out, crowded)
    late = facts[-1:] if count > 2 and rng.random() < 0.3 else []
    early = facts[: len(facts) - len(late)]
    context = [p for fact in early for p in stated(fact, filler)] + [Piece(filler(), FILLER)]
    first = next(i for i, p in enumerate(context) if p.text)
    context = [Piece(context[first].text.lstrip(), context[first].weight), *context[first + 1 :]]
    order = [(f.question, f.value) for f in rng.sample(early, len(early))[:questions]]
    turns = conversation(rng, context, order)
    for fact in late:  # told in the last user message, together with its question
        told = [Piece(fact.statement + fact.value + ". " + fact.question, 0.0)]
        turns += [Turn("user", told), answer(fact.value)]
    return turns


def table_turns(
    rng: random.Random, count: int, held_out: bool, questions: int | None = None
) -> list[Turn]:
    """A conversation over a table, a key per turn."""
    rows = table_rows(rng, count, held_out)
    keys = rng.sample(list(rows), len(rows))[:questions]
    return conversation(rng, table_pieces(rows), [(f"{k}?", rows[k]) for k in keys])


def conversation(
    rng: random.Random, context: list[Piece], order: list[tuple[str, str]]
) -> list[Turn]:
    """The context in the system message or in the first question's message, then all questions."""
    turns: list[Turn] = []
    in_system = rng.random() < 0.5
    if in_system:
        turns.append(Turn("system", context))
    elif rng.random() < 0.5:
        turns.append(Turn("system", [Piece(rng.choice(INSTRUCTIONS), FRAME)]))
    if rng.random() < 0.05:
        hello, reply = rng.choice(GREETINGS)
        turns += [Turn("user", [Piece(hello, 0.0)]), Turn("assistant", [Piece(reply, FILLER)])]
    for i, (question, value) in enumerate(order):
        lead = [] if in_system or i else [*context, Piece(rng.choice(("\n", "\n\n", " ")), 0.0)]
        turns += [Turn("user", [*lead, Piece(question, 0.0)]), answer(value)]
    return turns


def answer(value: str) -> Turn:
    """The assistant's message: the bare value."""
    return Turn("assistant", [Piece(value.strip(), ANSWER)])


def render(turns: list[Turn]) -> list[Piece]:
    """What the chat template makes of the turns; an answer's weight covers its end mark too."""
    out: list[Piece] = []
    for turn in turns:
        closing = turn.pieces[-1].weight if turn.role == "assistant" else 0.0
        out += [Piece(f"<|{turn.role}|>", 0.0), *turn.pieces, Piece(END, closing)]
    return out
