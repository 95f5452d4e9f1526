"""The frozen suite of `kvkeep bench eviction`: contexts, what is asked of them, what is right.

`bench/traces/eviction.json` holds parts, lengths, seeds and digests; every task of a model weighs
the same. Contexts of text are made as those of `bench.quality_suite`; those of the recall models
are ids of `tools.recall_model.data`. `python -m bench.eviction_suite` writes the file.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec

from bench import quality_suite
from bench.quality_suite import Context, Part, Probe, digest
from kvkeep.config import DEMO_MODEL
from kvkeep.models.text import TextModel
from tools.recall_model.data import FIRST_KEY, FIRST_VALUE, SENTENCE, VOCAB

FILE: Final = Path(__file__).parent / "traces" / "eviction.json"
VALUES_EACH: Final = 4
"""Values behind a key of `values`."""
LEAD: Final = 4
COPIED: Final = 12
BETWEEN: Final = 6
"""Filler in front of a later turn's question."""
ASKED_FIRST: Final = 4
"""Questions answered in the turns before."""


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """The committed file."""

    seed: int
    held_out: tuple[int, ...]
    """Each added to the seed for so many contexts: those that are reported."""
    development: tuple[int, ...]
    """The same for those that parameters are chosen on."""
    text: tuple[Part, ...]
    recall: tuple[Part, ...]
    digests: dict[str, str]
    """Of the held-out contexts: of text as the demo model's tokenizer makes them."""


def read() -> Suite:
    """Return the committed suite."""
    return msgspec.json.decode(FILE.read_bytes(), type=Suite)


def of_text(
    suite: Suite, text: TextModel, vocab_size: int, *, reseed: int = 0, quick: bool = False
) -> list[Context]:
    """Return the contexts of text, later turns of a conversation as questions.

    `reseed`: one of `held_out` or of `development`.
    """
    made = quality_suite.Suite(
        seed=suite.seed, weights={}, parts=suite.text, digest="", text=quality_suite.read().text
    )
    maker = quality_suite.Maker(made, text, vocab_size, reseed=reseed)
    found = (_asked(context, text) for context in maker.contexts(quick=quick))
    return [context for context in found if context.probes]


def _asked(context: Context, text: TextModel) -> Context:
    """Return a conversation up to its first question, and the later ones as probes."""
    if not context.turns:
        return context
    (_, told), (first, answer), *later = context.turns
    begun = [{"role": "system", "content": told}, {"role": "user", "content": first}]
    ids = tuple(text.apply_chat(begun))
    probes = []
    for question, right in later:
        more = [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        whole = tuple(text.apply_chat([*begun, *more]))
        if whole[: len(ids)] == ids:
            probes.append(Probe(task="turns", ids=whole[len(ids) :], answer=right))
    return Context(kind="turns", ids=ids, probes=tuple(probes))


def of_recall(suite: Suite, *, reseed: int = 0, quick: bool = False) -> list[Context]:
    """Return the recall models' contexts; each depends on its place alone."""
    seed = suite.seed + reseed
    found = []
    for part in suite.recall:
        for i in range(part.quick if quick else part.count):
            rng = random.Random(f"{seed} {part.kind} {part.tokens} {part.facts} {i}")
            found.append(_MAKERS[part.kind](part, rng))
    return found


def filler(rng: random.Random, tokens: int) -> list[int]:
    """Return drawn tokens, or the sentence over and over."""
    if rng.random() < 0.5:
        return [rng.randrange(1, FIRST_KEY) for _ in range(tokens)]
    phase = rng.randrange(SENTENCE)
    return [1 + (at + phase) % SENTENCE for at in range(tokens)]


def _keys(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(FIRST_KEY, FIRST_VALUE), count)


def _value(rng: random.Random) -> int:
    return rng.randrange(FIRST_VALUE, VOCAB)


def _strewn(rng: random.Random, tokens: int, pieces: Sequence[Sequence[int]]) -> list[int]:
    """Return filler of so many tokens with pieces put into it at random places."""
    noise = filler(rng, tokens - sum(map(len, pieces)))
    places = sorted(rng.randrange(len(noise) + 1) for _ in pieces)
    found: list[int] = []
    done = 0
    for place, piece in zip(places, rng.sample(pieces, len(pieces)), strict=True):
        found += [*noise[done:place], *piece]
        done = place
    return found + noise[done:]


def _probes(task: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Probe, ...]:
    return tuple(Probe(task=task, ids=tuple(q), copied=tuple(a)) for q, a in pairs)


def _pairs(part: Part, rng: random.Random) -> Context:
    """Keys and values amid filler, each shown once (`needle`, `mqar`) or three times (`shots`)."""
    told = [(key, _value(rng)) for key in _keys(rng, part.facts)]
    ids = _strewn(rng, part.tokens, told * (3 if part.kind == "shots" else 1))
    asked = rng.sample(told, part.asked)
    return Context(
        kind=part.kind,
        ids=tuple(ids),
        probes=_probes(part.kind, [((key,), (value,)) for key, value in asked]),
    )


def _values(part: Part, rng: random.Random) -> Context:
    """Keys with several values each."""
    values = rng.sample(range(FIRST_VALUE, VOCAB), VALUES_EACH * part.facts)
    told = [
        (key, *values[i * VALUES_EACH : (i + 1) * VALUES_EACH])
        for i, key in enumerate(_keys(rng, part.facts))
    ]
    ids = _strewn(rng, part.tokens, told)
    asked = rng.sample(told, part.asked)
    return Context(
        kind="values", ids=tuple(ids), probes=_probes("values", [(p[:1], p[1:]) for p in asked])
    )


def _copy(part: Part, rng: random.Random) -> Context:
    """A segment of different tokens; a probe repeats a few, and the next ones are right."""
    segment = rng.sample(range(FIRST_KEY, VOCAB), part.facts)
    ids = _strewn(rng, part.tokens, [segment])
    starts = [rng.randrange(part.facts - LEAD - COPIED + 1) for _ in range(part.asked)]
    asked = [(segment[at : at + LEAD], segment[at + LEAD : at + LEAD + COPIED]) for at in starts]
    return Context(kind="copy", ids=tuple(ids), probes=_probes("copy", asked))


def _gap(part: Part, rng: random.Random) -> Context:
    """One pair, so many tokens before the end as `facts` says."""
    key, value = _keys(rng, 1)[0], _value(rng)
    noise = filler(rng, part.tokens - 2)
    at = len(noise) - part.facts
    ids = (*noise[:at], key, value, *noise[at:])
    return Context(kind="gap", ids=ids, probes=_probes("gap", [((key,), (value,))]))


def _turns(part: Part, rng: random.Random) -> Context:
    """Pairs, then some of them asked and answered; the probes ask for others."""
    told = [(key, _value(rng)) for key in _keys(rng, part.facts)]
    order = rng.sample(told, ASKED_FIRST + part.asked)
    ids = _strewn(rng, part.tokens - ASKED_FIRST * (BETWEEN + 2), told)
    for pair in order[:ASKED_FIRST]:
        ids += [*filler(rng, BETWEEN), *pair]
    asked = [((*filler(rng, BETWEEN), key), (value,)) for key, value in order[ASKED_FIRST:]]
    return Context(kind="turns", ids=tuple(ids), probes=_probes("turns", asked))


_MAKERS: Final = {
    "needle": _pairs,
    "mqar": _pairs,
    "shots": _pairs,
    "values": _values,
    "copy": _copy,
    "gap": _gap,
    "turns": _turns,
}

HELD_OUT: Final = (0, *range(31000, 38000, 1000))
DEVELOPMENT: Final = tuple(range(2000, 26000, 1000))
"""Not 1000: `corm` was chosen on that several times over before there were so many."""
TEXT: Final = (
    Part(kind="facts", tokens=512, facts=10, count=14, quick=1, asked=6),
    Part(kind="facts", tokens=1024, facts=16, count=14, quick=1, asked=6),
    Part(kind="facts", tokens=2048, facts=24, count=4, quick=0, asked=6),
    Part(kind="table", tokens=480, facts=40, count=14, quick=1, asked=6),
    Part(kind="table", tokens=960, facts=80, count=8, quick=0, asked=6),
    Part(kind="copy", tokens=480, count=10, quick=1, asked=6),
    Part(kind="copy", tokens=960, count=6, quick=0, asked=6),
    Part(kind="chat", tokens=512, facts=10, count=14, quick=1, asked=7),
    Part(kind="chat", tokens=1024, facts=16, count=10, quick=0, asked=7),
)
RECALL: Final = (
    *(
        Part(kind=kind, tokens=tokens, facts=facts, count=count, quick=1, asked=asked)
        for tokens, count in ((512, 12), (896, 12))
        for kind, facts, asked in (
            ("needle", 4, 4), ("mqar", 20, 12), ("shots", 10, 8), ("values", 8, 8),
            ("copy", 48, 6), ("turns", 20, 12)
        )
    ),
    *(
        Part(kind="gap", tokens=512, facts=gap, count=20, quick=1, asked=1)
        for gap in (16, 32, 64, 128, 256)
    ),
)  # fmt: skip


def main() -> int:
    """Write the committed suite."""
    suite = Suite(
        seed=11, held_out=HELD_OUT, development=DEVELOPMENT, text=TEXT, recall=RECALL, digests={}
    )
    made = dict(held_out(suite))
    suite = msgspec.structs.replace(suite, digests=made)
    FILE.write_text(json.dumps(msgspec.to_builtins(suite), indent=1) + "\n", encoding="utf-8")
    return 0


def held_out(suite: Suite) -> Iterator[tuple[str, str]]:
    """Yield what names the held-out contexts."""
    text = TextModel.load(DEMO_MODEL)
    told = [of_text(suite, text, 2048, reseed=seed) for seed in suite.held_out]
    yield "text", digest(list(chain.from_iterable(told)))
    shown = [of_recall(suite, reseed=seed) for seed in suite.held_out]
    yield "recall", digest(list(chain.from_iterable(shown)))


if __name__ == "__main__":
    sys.exit(main())
