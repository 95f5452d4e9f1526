"""Samples as rows of ids and weights, and batches that depend on (seed, stage, index) alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_model import data
from tools.demo_model.stages import KINDS, Part, Stage

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]


class Sample(NamedTuple):
    """ids and weights of T + 1 positions."""

    ids: Ids
    weights: Weights


@dataclass(frozen=True, slots=True)
class Quiz:
    """Facts per sample (least, most), the share asked at the end, the share of crowded samples.

    `ends` asks that many at the end instead; `held_out` takes the evaluation's side of the split.
    """

    facts: tuple[int, int]
    asked: float = 0.5
    crowded: float = 0.0
    held_out: bool = False
    ends: int | None = None


class Batch(NamedTuple):
    """kinds [B] index KINDS; ids and weights are [B, T + 1]."""

    kinds: Tensor
    ids: Tensor
    weights: Tensor


class Corpus:
    """The documentation text as sentences and as two rows of tokens: for training, held out."""

    def __init__(self, tok: Tokenizer, texts: list[str]) -> None:
        self.tok = tok
        cut = max(1, len(texts) // 50)  # the first 2 % are held out
        self.sentences = [
            s.strip() + "."
            for text in texts[cut:]
            for s in text.replace("\n", " ").split(". ")
            if 30 < len(s) < 160
        ]
        self.train, self.held_out = self._join(texts[cut:]), self._join(texts[:cut])

    def _join(self, texts: list[str]) -> Ids:
        return np.concatenate(
            [np.array([*e.ids, 0], np.int32) for e in self.tok.encode_batch(texts)]
        )


def copy_order(vocab: int) -> NDArray[np.int64]:
    """Tokens in the order in which growing copy vocabularies take them in."""
    return np.random.default_rng(0).permutation(vocab)


class Sampler:
    """Makes samples from one random stream."""

    def __init__(self, corpus: Corpus, *seed: int) -> None:
        self.corpus = corpus
        self.rng = random.Random(repr(seed))
        self.np = np.random.default_rng(seed)

    def encode(self, pieces: list[data.Piece]) -> Sample:
        """Tokens of the joined pieces; a token has the weight of its last character."""
        encoding = self.corpus.tok.encode("".join(p.text for p in pieces))  # ASCII throughout
        lengths = [len(p.text) for p in pieces]
        weights = np.repeat(np.array([p.weight for p in pieces], np.float32), lengths)
        ends = np.array([end for _, end in encoding.offsets]) - 1
        return Sample(np.array(encoding.ids, np.int32), weights[ends])

    def copy(self, length: int, vocab: int, smallest: int) -> Sample:
        """A random segment repeated until the row is full; its first pass has no weight."""
        rng = self.np
        size = int(2 ** rng.uniform(np.log2(min(smallest, vocab)), np.log2(vocab)))
        alphabet = copy_order(self.corpus.tok.get_vocab_size())[:vocab]
        subset = rng.choice(alphabet, min(size, len(alphabet)), replace=False)
        period = int(rng.integers(4, length // 2 + 1))
        weights = np.ones(length + 1, np.float32)
        weights[: period + 1] = 0
        ids = np.resize(rng.choice(subset, period), length + 1).astype(np.int32)
        return Sample(ids, weights)

    def text(self, length: int) -> Sample:
        """A stretch of documentation."""
        i = int(self.np.integers(0, len(self.corpus.train) - length - 1))
        weights = np.full(length + 1, data.FILLER, np.float32)
        return Sample(self.corpus.train[i : i + length + 1], weights)

    def filler(self, chars: float) -> data.Filler:
        """Sentences of about `chars` characters on average."""

        def sentences() -> str:
            out, size, goal = [""], 0, self.rng.random() * 2 * chars
            while size < goal:
                out.append(self.rng.choice(self.corpus.sentences))
                size += len(out[-1])
            return " ".join(out)

        return sentences

    def recall(self, length: int, quiz: Quiz) -> Sample:
        """Facts with questions in plain text."""

        def build(count: int, filler: data.Filler, questions: int) -> list[data.Piece]:
            return data.recall_text(self.rng, count, filler, quiz.held_out, questions, quiz.crowded)

        return self._fit(length, quiz, build, 0.3)

    def chat(self, length: int, quiz: Quiz) -> Sample:
        """A conversation over facts, or one in five times over a table."""

        def build(count: int, filler: data.Filler, questions: int) -> list[data.Piece]:
            if table:
                turns = data.table_turns(self.rng, count, quiz.held_out, questions)
            else:
                turns = data.chat_turns(
                    self.rng, count, filler, quiz.held_out, questions, quiz.crowded
                )
            return data.render(turns)

        table = not quiz.held_out and self.rng.random() < 0.2
        if table:
            quiz = replace(quiz, facts=(3, max(4, length // 32)))
        return self._fit(length, quiz, build, 0.0)

    def _fit(
        self,
        length: int,
        quiz: Quiz,
        build: Callable[[int, data.Filler, int], list[data.Piece]],
        middle: float,
    ) -> Sample:
        """Build until the sample fits: less filler first, then fewer facts and questions."""
        count = self.rng.randint(*quiz.facts)
        questions = count
        if quiz.ends or length > 128:
            questions = quiz.ends or max(2, int(count * quiz.asked))
        room = max(0, length - count * 16 - questions * 24 - int(middle * count * 24))
        while True:
            sample = self.encode(build(count, self.filler(3.2 * room / (count + 1)), questions))
            if len(sample.ids) <= length + 1:
                return padded(sample, length)
            if room < 8:
                count, questions = max(2, count - 1), max(1, questions - 1)
            room = max(0, int(room * 0.9) - 8)

    def table(self, length: int, held_out: bool = False) -> Sample:
        """A table whose keys are all asked."""
        count = self.rng.randint(3, min(100, max(4, length // 24)))
        while True:
            sample = self.encode(data.table_text(self.rng, count, held_out))
            if len(sample.ids) <= length + 1:
                return padded(sample, length)
            count -= 1

    def sample(self, kind: str, part: Part) -> Sample:
        """A training sample of one of KINDS."""
        if kind == "copy":
            return self.copy(part.length, part.copy_vocab, part.copy_smallest)
        if kind == "text":
            return self.text(part.length)
        if kind == "table":
            return self.table(part.length)
        quiz = Quiz(part.facts, part.asked, part.crowded)
        if kind == "recall":
            return self.recall(part.length, quiz)
        return self.chat(part.length, quiz)


def padded(sample: Sample, length: int) -> Sample:
    """The sample at length + 1 positions; what is added has no weight."""
    missing = (0, length + 1 - len(sample.ids))
    return Sample(np.pad(sample.ids, missing), np.pad(sample.weights, missing))


class StageBatches:
    """Batch number i of a stage, the same in every run."""

    def __init__(self, corpus: Corpus, stage: Stage, number: int, seed: int) -> None:
        self.corpus, self.stage, self.number, self.seed = corpus, stage, number, seed

    def __getitem__(self, index: int) -> Batch:
        sampler = Sampler(self.corpus, self.seed, self.number, index)
        part = self.stage.parts[index % len(self.stage.parts)]
        kinds = sampler.rng.choices(
            list(part.mix), list(part.mix.values()), k=part.tokens // part.length
        )
        rows = [sampler.sample(kind, part) for kind in kinds]
        return Batch(
            torch.tensor([KINDS.index(kind) for kind in kinds]),
            torch.from_numpy(np.stack([row.ids for row in rows])).long(),
            torch.from_numpy(np.stack([row.weights for row in rows])),
        )
