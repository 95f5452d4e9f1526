"""Does a chat template keep a growing conversation's tokens, so that its pages can be reused?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from kvkeep.models.text import TextModel

TURNS = (
    ("Which doors does the old house have?", "It has a north door and a garden door."),
    ("Which one is locked?", "The north door is locked at night."),
    ("Who keeps the key?", "The keeper does; the spare one hangs by the stove."),
    ("Thank you.", "You are welcome."),
)
AROUND_TOKENS = 8


@dataclass(frozen=True, slots=True)
class TemplateBreak:
    """Where a later prompt stops repeating the conversation before it."""

    turn: int
    """The turn (from 1) whose tokens are not found again."""
    position: int
    """First token that differs."""
    was: str
    """Text from there on when the turn ended."""
    becomes: str
    """Text from there on in the next turn's prompt."""


def first_break(path: Path) -> TemplateBreak | None:
    """Return the first break over a few turns; None where each turn is a prefix of the next.

    A turn's tokens are its prompt, and its prompt with the reply in place of the generation prompt.
    """
    text = TextModel.load(path)
    messages: list[dict[str, str]] = []
    before: list[list[int]] = []
    for turn, (question, answer) in enumerate(TURNS):
        messages.append({"role": "user", "content": question})
        prompt = text.apply_chat(messages)
        breaks = [_compare(text, turn, old, prompt) for old in before]
        if found := min(
            (b for b in breaks if b is not None), key=lambda b: b.position, default=None
        ):
            return found
        messages.append({"role": "assistant", "content": answer})
        before = [prompt, text.apply_chat(messages, add_generation_prompt=False)]
    return None


def _compare(text: TextModel, turn: int, old: list[int], new: list[int]) -> TemplateBreak | None:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    if same == len(old):
        return None
    was, becomes = (
        text.decode(ids[same : same + AROUND_TOKENS], skip_special_tokens=False)
        for ids in (old, new)
    )
    return TemplateBreak(turn, same, was, becomes)
