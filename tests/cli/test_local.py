"""`generate` and `chat --model` as programs, on the demo model: what they print is what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from kvkeep.cli.chat import Message
from kvkeep.config import DEMO_MODEL
from kvkeep.models.text import TextModel
from tests.engines import greedy_oracle

TOKENS = 6
PROMPT = "The access code of the north gate is"
QUESTIONS = ("The access code of the north gate is 4711. Which code?", "And which gate?")
TIMEOUT_S = 100.0


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ran() -> dict[str, Ran]:
    """Run both at a time: most of what either does is to start."""
    typed = (QUESTIONS[0], "", *QUESTIONS[1:], "/quit", "never read")
    inputs = {"generate": PROMPT, "chat": "\n".join(typed)}
    arguments = {"generate": ["-"], "chat": ["--model", str(DEMO_MODEL)]}
    small = ["--dtype", "float32", "--threads", "1", "--max-tokens", str(TOKENS)]
    programs = {
        name: subprocess.Popen(
            [sys.executable, "-m", "kvkeep", name, *arguments[name], *small],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"KVKEEP_KV_CACHE_MEMORY_BYTES": "32MiB"},
            text=True,
        )
        for name in arguments
    }
    done = {}
    try:
        for name, program in programs.items():
            out, err = program.communicate(inputs[name], TIMEOUT_S)
            done[name] = Ran(program.returncode, out, err)
    finally:
        for program in programs.values():
            program.kill()
    return done


def greedy(text: TextModel, prompt: list[int]) -> str:
    """Return what transformers goes on with, up to the end of a text."""
    ids = greedy_oracle(DEMO_MODEL, prompt, TOKENS)
    end = text.eos_token_id
    return text.decode(ids[: ids.index(end)] if end in ids else ids)


def test_generate_goes_on_from_stdin(ran: dict[str, Ran]) -> None:
    text = TextModel.load(DEMO_MODEL)
    expected = greedy(text, text.encode(PROMPT))
    assert expected.strip()
    assert ran["generate"].code == 0, ran["generate"].err
    assert ran["generate"].out == f"{expected}\n"
    assert str(DEMO_MODEL) in ran["generate"].err


def test_chat_answers_turn_by_turn_until_it_is_quit(ran: dict[str, Ran]) -> None:
    text = TextModel.load(DEMO_MODEL)
    history: list[Message] = []
    for question in QUESTIONS:
        history.append({"role": "user", "content": question})
        answer = greedy(text, text.apply_chat(history))
        history.append({"role": "assistant", "content": answer})
    answers = [turn["content"] for turn in history[1::2]]
    assert all(answer.strip() for answer in answers)
    assert ran["chat"].code == 0, ran["chat"].err
    assert ran["chat"].out == "".join(f"{answer}\n\n" for answer in answers)
