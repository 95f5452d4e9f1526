"""The demo model's held-out questions as documents with four choices each."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from kvkeep.config import DEMO_MODEL
from kvkeep.models.text import TextModel


class Document(NamedTuple):
    """A rendered conversation up to a question, its answer, and the answer among others."""

    prompt: str
    answer: str
    choices: list[str]
    label: int


def documents(count: int, seed: int = 0) -> list[Document]:
    """Return some held-out questions; wrong choices are answers of other conversations."""
    text, chance = TextModel.load(DEMO_MODEL), random.Random(seed)
    lines = (DEMO_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        messages = json.loads(line)["messages"]
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                found.append((text.render_chat(messages[:turn]), message["content"]))
    answers = sorted({answer for _, answer in found})
    chosen = chance.sample(found, count)
    return [_document(prompt, answer, answers, chance) for prompt, answer in chosen]


def write(docs: list[Document], path: Path) -> None:
    """Write documents as the tasks read them."""
    path.write_text("".join(json.dumps(doc._asdict()) + "\n" for doc in docs), encoding="utf-8")


def _document(prompt: str, answer: str, answers: list[str], chance: random.Random) -> Document:
    alike = [a for a in answers if a != answer and a.isdigit() == answer.isdigit()]
    choices = [*chance.sample(alike, 3), answer]
    chance.shuffle(choices)
    return Document(prompt, answer, choices, choices.index(answer))
