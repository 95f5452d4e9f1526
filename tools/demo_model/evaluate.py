"""Scores of a finished checkpoint on held-out entities and codes, through transformers.

An answer counts when all its tokens are right. `recall`, `table`, `chat` and `table_chat` take the
arg-max of one pass over the row with the true answers; `chat_generated` applies the chat template,
lets `generate` answer turn after turn and keeps the model's own answers in the conversation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama import LlamaForCausalLM

from tools.demo_model import data
from tools.demo_model.samples import Corpus, Quiz, Sample, Sampler
from tools.demo_model.words import GREETINGS

LENGTHS = (256, 512, 1024, 2048)
FACTS = {256: (4, 6), 512: (8, 10), 1024: (8, 24), 2048: (8, 24)}
QUESTIONS = 4
SEED = 1234
GATE_LENGTH, GATE = 2048, 0.97
GATED = ("recall", "chat", "chat_generated")


def quiz(length: int, crowded: float = 0.0) -> Quiz:
    """What is asked of a context of this length."""
    return Quiz(FACTS[length], crowded=crowded, held_out=True, ends=QUESTIONS)


class Score(NamedTuple):
    """How many of the answers (or copied tokens) were right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Right answers among all."""
        return self.right / max(1, self.asked)

    @property
    def error(self) -> float:
        """Binomial standard error of the share, answers counted as independent."""
        return math.sqrt(self.share * (1 - self.share) / max(1, self.asked))


class TextScore(NamedTuple):
    """Loss on held-out documentation."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores by length and task, and the loss on text."""

    tasks: dict[int, dict[str, Score]]
    text: TextScore

    def missed(self) -> list[str]:
        """The gated tasks that are below the gate."""
        at = self.tasks[GATE_LENGTH]
        return [f"{t} {at[t].share:.1%}" for t in GATED if at[t].share < GATE]

    def write(self, path: Path) -> None:
        """Save as JSON, shares in percent."""
        tasks = {
            str(length): {
                name: {
                    "percent": round(100 * s.share, 2),
                    "standard_error": round(100 * s.error, 2),
                    "asked": s.asked,
                }
                for name, s in at.items()
            }
            for length, at in self.tasks.items()
        }
        path.write_text(json.dumps({"tasks": tasks, "text": self.text._asdict()}, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model and its tokenizer as transformers loads them."""

    model: LlamaForCausalLM
    tok: PreTrainedTokenizerFast

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Load from a folder in the dtype it was saved in."""
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))


def answer_spans(weights: np.ndarray) -> list[tuple[int, int]]:
    """Runs of answer tokens in a row of weights, as (first, past the last)."""
    edges = np.diff(np.concatenate(([0], weights == data.ANSWER, [0])).astype(int))
    on = np.flatnonzero(edges)
    return list(zip(on[::2].tolist(), on[1::2].tolist(), strict=True))


@torch.no_grad()
def best_next(model: LlamaForCausalLM, sample: Sample) -> np.ndarray:
    """Arg-max prediction of ids[1:]."""
    ids = torch.from_numpy(sample.ids[None, :-1].astype(np.int64))
    out: np.ndarray = model(ids).logits[0].argmax(-1).numpy()
    return out


def answers(model: LlamaForCausalLM, rows: list[Sample]) -> Score:
    """Exact match over all answers of the rows."""
    right = asked = 0
    for row in rows:
        hit = best_next(model, row) == row.ids[1:]
        # A code is asked by its digits and end mark: each run of answer weight is one answer.
        for first, last in answer_spans(row.weights):
            right, asked = right + bool(hit[first - 1 : last - 1].all()), asked + 1
    return Score(right, asked)


def copying(model: LlamaForCausalLM, rows: list[Sample]) -> Score:
    """Right tokens after the first pass of the segment."""
    right = asked = 0
    for row in rows:
        scored = row.weights[1:] > 0
        right += int((best_next(model, row) == row.ids[1:])[scored].sum())
        asked += int(scored.sum())
    return Score(right, asked)


def messages_of(text: str) -> list[dict[str, str]]:
    """The messages of a rendered conversation."""
    found = re.findall(r"<\|(system|user|assistant)\|>(.*?)<\|end\|>", text, re.DOTALL)
    return [{"role": role, "content": content} for role, content in found]


def conversations(
    tok: PreTrainedTokenizerFast, sampler: Sampler, length: int, count: int
) -> Iterator[list[dict[str, str]]]:
    """Held-out conversations without small talk as messages, with the true answers."""
    replies = {reply for _, reply in GREETINGS}
    while count:
        row = sampler.chat(length, quiz(length))
        messages = messages_of(tok.decode(row.ids.tolist()))
        again = tok.apply_chat_template(messages, return_dict=False)
        if again != row.ids[: len(again)].tolist():
            raise ValueError("the chat template does not render what the model was trained on")
        if replies.isdisjoint(m["content"] for m in messages):
            count -= 1
            yield messages


@torch.no_grad()
def generated(checkpoint: Checkpoint, talks: Iterator[list[dict[str, str]]]) -> Score:
    """Exact match of generated answers, end mark included."""
    model, tok = checkpoint.model, checkpoint.tok
    right = asked = 0
    for messages in talks:
        history: list[dict[str, str]] = []
        for message in messages:
            if message["role"] != "assistant":
                history.append(message)
                continue
            prompt = tok.apply_chat_template(
                history, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
            right += tok.decode(out) == message["content"] + data.END
            asked += 1
            said = tok.decode(out, skip_special_tokens=True)
            history.append({"role": "assistant", "content": said})
    return Score(right, asked)


@torch.no_grad()
def text_score(checkpoint: Checkpoint, corpus: Corpus, width: int = 1024) -> TextScore:
    """Loss on the held-out documentation, in windows of `width` tokens."""
    loss, size, count = 0.0, 0, 0
    ids = torch.from_numpy(corpus.held_out.astype(np.int64))
    for i in range(0, len(ids) - 1, width):
        window = ids[i : i + width + 1]
        logits = checkpoint.model(window[None, :-1]).logits[0].float()
        loss += F.cross_entropy(logits, window[1:], reduction="sum").item()
        size += len(checkpoint.tok.decode(window[1:].tolist(), skip_special_tokens=True))
        count += len(window) - 1
    return TextScore(round(loss / count, 4), round(loss / math.log(2) / size, 4), count)


def table_chat(sampler: Sampler, length: int) -> Sample:
    """A conversation over a held-out table of a row per 32 tokens, as long as it comes."""
    rows = length // 32
    turns = data.table_turns(sampler.rng, rows, held_out=True, questions=QUESTIONS)
    return sampler.encode(data.render(turns))


def evaluate(folder: Path, corpus: Corpus, contexts: int = 80) -> Scores:
    """All scores of the checkpoint in `folder`."""
    checkpoint = Checkpoint.load(folder)
    model = checkpoint.model
    tasks: dict[int, dict[str, Score]] = {}
    for length in LENGTHS:
        sampler = Sampler(corpus, SEED, length)
        turns = range(contexts)
        tasks[length] = {
            "recall": answers(model, [sampler.recall(length, quiz(length)) for _ in turns]),
            "chat": answers(model, [sampler.chat(length, quiz(length)) for _ in turns]),
            "table": answers(model, [sampler.table(length, True) for _ in range(contexts // 4)]),
            "table_chat": answers(
                model, [table_chat(sampler, length) for _ in range(contexts // 2)]
            ),
            "copying": copying(model, [sampler.copy(length, 2048, 8) for _ in range(8)]),
            "copying_256": copying(model, [sampler.copy(length, 2048, 256) for _ in range(8)]),
            "chat_crowded": answers(
                model, [sampler.chat(length, quiz(length, 1.0)) for _ in range(contexts // 2)]
            ),
            "chat_generated": generated(
                checkpoint, conversations(checkpoint.tok, sampler, length, contexts // 2)
            ),
        }
        for name, score in tasks[length].items():
            print(f"{length:5d} {name:15s} {score.share:7.2%} +- {score.error:.2%} n={score.asked}")
    return Scores(tasks, text_score(checkpoint, corpus))
