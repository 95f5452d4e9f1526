"""What packing weights to int8 costs in quality and gains in speed, beside the float weights.

Quality is measured on the demo model's held-out conversations: right answers, and the mean
log-probability (nats per token) of every prompt token. Speed is decode at batch 1 on random
weights of Qwen2.5-0.5B's shapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Figure, Options, Report, Row, estimate, ratio
from bench.ours import Ours
from kvkeep.config import DEMO_MODEL
from kvkeep.engine.api import SamplingParams
from kvkeep.models import make
from kvkeep.models.text import TextModel

LIKE = "qwen2.5-0.5b"
ANSWER_TOKENS = 16


class Quality(NamedTuple):
    """One packing's results on the held-out conversations."""

    right: float
    """Share of questions answered exactly."""
    questions: int
    nats_per_token: float


def quality(ours: Ours, text: TextModel, conversations: Sequence[list[dict[str, str]]]) -> Quality:
    """Ask every question with the right earlier answers in place, and score the prompts."""
    right = asked = tokens = 0
    nats = 0.0
    for messages in conversations:
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked += 1
            prompt = text.apply_chat(messages[:turn])
            answer = ours.answer(prompt, SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0))
            right += answer.strip() == message["content"].strip()
        scores = ours.prompt_scores(text.apply_chat(messages, add_generation_prompt=False))
        nats -= sum(scores)
        tokens += len(scores)
    return Quality(right / asked, asked, nats / tokens)


def measure(options: Options) -> Report:
    """Compare float with int8 weights."""
    lines = (DEMO_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    if options.quick:
        conversations = conversations[:6]
    text = TextModel.load(DEMO_MODEL)
    rows: list[Row] = []
    found: dict[str, Quality] = {}
    for weights in ("float", "int8"):
        demo = Ours(DEMO_MODEL, threads=options.threads, kv_cache_bytes=1 << 28, weights=weights)
        found[weights] = quality(demo, text, conversations)
        rows.append({"weights": weights, "model": "demo", **found[weights]._asdict()})
    with TemporaryDirectory() as directory:
        path = make.make(LIKE, Path(directory) / LIKE, seed=0)
        plain = Ours(path, threads=options.threads, kv_cache_bytes=1 << 28)
        packed = Ours(path, threads=options.threads, kv_cache_bytes=1 << 28, weights="int8")
    pairs = harness.interleave(
        lambda: packed.decode_rate(1, 24),
        lambda: plain.decode_rate(1, 24),
        3 if options.quick else MIN_PAIRS,
    )
    figures = (
        Figure(
            "int8_right_minus_float",
            estimate([found["int8"].right - found["float"].right]),
        ),
        Figure(
            "int8_nats_minus_float",
            estimate([found["int8"].nats_per_token - found["float"].nats_per_token]),
        ),
        Figure("int8_decode_b1_vs_float", ratio(pairs)),
    )
    params: dict[str, Cell] = {
        "quality_model": "demo",
        "speed_model": LIKE,
        "threads": options.threads,
    }
    return Report("int8_weights", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("int8_weights", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
