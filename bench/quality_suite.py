"""The frozen suite of `kvkeep bench quality`: contexts, what is asked of them, what is right.

`bench/traces/quality.json` holds tasks, lengths, weights, seeds and the text; contexts are made
from them, and a digest in the file says that they are the same as ever. `python -m
bench.quality_suite` writes it. The text is documentation of Python 3.11 (Copyright Python Software
Foundation, PSF licence 2) that the demo model was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from kvkeep.config import DEMO_MODEL
from kvkeep.errors import InvalidRequest
from kvkeep.models.text import TextModel
from tools.demo_model import data
from tools.demo_model.tokenizer import corpus

FILE: Final = Path(__file__).parent / "traces" / "quality.json"
CHARS_PER_TOKEN: Final = 3
SHOTS: Final = 3
"""Questions answered in front of a few-shot question."""
COPY_LEAD: Final = 12
COPIED: Final = 16
BLOCK: Final = 32
"""Tokens of text that make up an item."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Contexts of one kind and length; `quick` of the `count` are in the quick run."""

    kind: str
    """`facts`, `table`, `copy`, `chat` or `text`."""
    tokens: int
    """About the context's length, in the demo model's tokens."""
    count: int
    quick: int
    asked: int
    """Questions of each task."""
    facts: int = 0


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """The committed file."""

    seed: int
    weights: dict[str, float]
    """Of each task in the mean."""
    parts: tuple[Part, ...]
    digest: str
    """Of all contexts as the demo model's tokenizer makes them."""
    text: tuple[str, ...]


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What follows a context, and how the right answer goes."""

    task: str
    ids: tuple[int, ...]
    answer: str = ""
    copied: tuple[int, ...] = ()
    """The right tokens, where single ones count."""


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """A beginning that several probes share, a conversation, or a text to be scored."""

    kind: str
    ids: tuple[int, ...] = ()
    probes: tuple[Probe, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    """Of a conversation: what the user says and the right answer."""


def read() -> Suite:
    """Return the committed suite."""
    return msgspec.json.decode(FILE.read_bytes(), type=Suite)


def digest(contexts: list[Context]) -> str:
    """Return what names these contexts."""
    return hashlib.sha256(msgspec.json.encode(contexts)).hexdigest()


class Maker:
    """Makes a suite's contexts with one tokenizer."""

    def __init__(self, suite: Suite, text: TextModel, vocab_size: int, *, reseed: int = 0) -> None:
        """`reseed`: other contexts of the same kinds, to learn from."""
        self._suite = msgspec.structs.replace(suite, seed=suite.seed + reseed)
        self._text = text
        self._vocab_size = vocab_size
        self._sentences = [
            sentence.strip() + "."
            for paragraph in suite.text
            for sentence in paragraph.replace("\n", " ").split(". ")
            if 30 < len(sentence) < 160
        ]

    def contexts(self, *, quick: bool = False) -> list[Context]:
        """Return all contexts, or those of the quick run; each depends on its place alone."""
        found: list[Context] = []
        for part in self._suite.parts:
            for i in range(part.quick if quick else part.count):
                rng = random.Random(f"{self._suite.seed} {part.kind} {part.tokens} {i}")
                found += self._made(part, rng, i)
        return found

    def _made(self, part: Part, rng: random.Random, index: int) -> Iterator[Context]:
        if part.kind == "facts":
            yield self._facts(part, rng)
        elif part.kind == "table":
            yield self._table(part, rng)
        elif part.kind == "copy":
            yield self._copy(part, rng)
        elif part.kind == "chat":
            yield from self._chat(part, rng)
        else:
            yield from self._windows(part, index)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._text.encode(text, add_special_tokens=False))

    def _told(self, part: Part, rng: random.Random) -> tuple[str, list[data.Fact]]:
        """Return facts amid sentences, and the facts."""
        facts = data.distinct_facts(rng, part.facts, held_out=True)
        said = [f"{fact.statement}{fact.value}." for fact in facts]
        room = part.tokens * CHARS_PER_TOKEN - sum(map(len, said))
        while room > 0:
            sentence = rng.choice(self._sentences)
            said.insert(rng.randrange(len(said) + 1), sentence)
            room -= len(sentence) + 1
        return " ".join(said), facts

    def _facts(self, part: Part, rng: random.Random) -> Context:
        told, facts = self._told(part, rng)
        pairs = [(f"\nQuestion: {fact.question} Answer:", fact.value) for fact in facts]
        probes = self._probes("recall", "", pairs, part, rng, end=".")
        return Context(kind=part.kind, ids=self._ids(told), probes=probes)

    def _table(self, part: Part, rng: random.Random) -> Context:
        rows = data.table_rows(rng, part.facts, held_out=False)
        table = "Table:" + "".join(f"\n{key}:{value}" for key, value in rows.items())
        pairs = [(f"\n{key}?", value) for key, value in rows.items()]
        probes = self._probes("table", "\nLookup:", pairs, part, rng, end="")
        return Context(kind=part.kind, ids=self._ids(table), probes=probes)

    def _probes(
        self,
        task: str,
        head: str,
        pairs: list[tuple[str, str]],
        part: Part,
        rng: random.Random,
        *,
        end: str,
    ) -> tuple[Probe, ...]:
        """Return questions as they are, then questions after some answered ones."""
        found = []
        for question, answer in rng.sample(pairs, part.asked):
            found.append(Probe(task=task, ids=self._ids(head + question), answer=answer.strip()))
        for question, answer in rng.sample(pairs, part.asked):
            others = [pair for pair in pairs if pair[0] != question]
            shots = "".join(f"{q}{a}{end}" for q, a in rng.sample(others, SHOTS))
            ids = self._ids(head + shots + question)
            found.append(Probe(task="few_shot", ids=ids, answer=answer.strip()))
        return tuple(found)

    def _copy(self, part: Part, rng: random.Random) -> Context:
        """Different tokens in a row; a probe repeats a few, and the next ones are right."""
        begin = self._vocab_size // 16
        segment = rng.sample(range(begin, self._vocab_size), part.tokens)
        probes = []
        for _ in range(part.asked):
            at = rng.randrange(COPY_LEAD, part.tokens - COPIED)
            lead, right = segment[at - COPY_LEAD : at], segment[at : at + COPIED]
            probes.append(Probe(task="copy", ids=tuple(lead), copied=tuple(right)))
        return Context(kind=part.kind, ids=tuple(segment), probes=tuple(probes))

    def _chat(self, part: Part, rng: random.Random) -> Iterator[Context]:
        """A conversation over facts, if the model has a chat template."""
        try:
            self._text.apply_chat([{"role": "user", "content": "?"}])
        except InvalidRequest:
            return
        told, facts = self._told(part, rng)
        asked = [(f.question, f.value.strip()) for f in rng.sample(facts, part.asked)]
        yield Context(kind=part.kind, turns=(("", told), *asked))

    def _windows(self, part: Part, index: int) -> Iterator[Context]:
        ids = self._ids("\n\n".join(self._suite.text))
        window = ids[index * part.tokens : (index + 1) * part.tokens]
        if len(window) > BLOCK:
            yield Context(kind=part.kind, ids=window)


def right(probe: Probe, said: str, tokens: tuple[int, ...]) -> float:
    """Return 1 for the right answer and 0 for another; a share where single tokens count."""
    if probe.copied:
        pairs = zip(probe.copied, tokens, strict=False)
        return sum(a == b for a, b in pairs) / len(probe.copied)
    return float(re.match(rf"{re.escape(probe.answer)}(?!\w)", said.strip()) is not None)


PARTS: Final = (
    *(
        Part(kind="facts", tokens=tokens, facts=facts, count=count, quick=quick, asked=8)
        for tokens, facts, count, quick in (
            (256, 8, 40, 0), (512, 10, 40, 2), (1024, 16, 40, 4), (2048, 24, 16, 0)
        )
    ),
    *(
        Part(kind="table", tokens=12 * rows, facts=rows, count=40, quick=quick, asked=6)
        for rows, quick in ((20, 0), (40, 3), (80, 0))
    ),
    *(
        Part(kind="copy", tokens=tokens, count=24, quick=quick, asked=11)
        for tokens, quick in ((240, 0), (480, 3), (960, 0))
    ),
    *(
        Part(kind="chat", tokens=tokens, facts=facts, count=60, quick=quick, asked=4)
        for tokens, facts, quick in ((512, 10, 4), (1024, 16, 2))
    ),
    Part(kind="text", tokens=1024, count=8, quick=2, asked=0),
)  # fmt: skip
TASKS: Final = ("recall", "table", "copy", "few_shot", "chat", "text")


def made(seed: int, text: tuple[str, ...]) -> Suite:
    """Return the suite of a text."""
    suite = Suite(seed=seed, weights=dict.fromkeys(TASKS, 1.0), parts=PARTS, digest="", text=text)
    contexts = Maker(suite, TextModel.load(DEMO_MODEL), 2048).contexts()
    return msgspec.structs.replace(suite, digest=digest(contexts))


def main() -> int:
    """Write the committed suite; needs the Python whose documentation it is, 3.11.7."""
    texts = corpus(0)
    suite = made(7, tuple(texts[: len(texts) // 50]))
    FILE.write_text(json.dumps(msgspec.to_builtins(suite), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
