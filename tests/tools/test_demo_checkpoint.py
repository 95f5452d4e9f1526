from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools.demo_model.evaluate import GATE, GATE_LENGTH, GATED, Checkpoint, generated

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "src" / "kvkeep" / "demo"


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint.load(DEMO)


def test_committed_model_is_small_and_shaped_as_promised(demo: Checkpoint) -> None:
    config = demo.model.config
    assert sum(p.numel() for p in demo.model.parameters()) <= 4_000_000
    assert (DEMO / "model.safetensors").stat().st_size <= 8_000_000
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 64)
    assert config.max_position_embeddings >= 4096
    assert demo.model.dtype == torch.bfloat16
    assert demo.model.generation_config.eos_token_id == [4, 0]


def test_committed_scores_reach_the_gate() -> None:
    scores = json.loads((ROOT / "tools" / "demo_model" / "scores.json").read_text())
    at = scores["tasks"][str(GATE_LENGTH)]
    assert all(at[task]["percent"] >= 100 * GATE for task in GATED), at


def test_committed_model_answers_held_out_conversations(demo: Checkpoint) -> None:
    lines = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]
    short = [line["messages"] for line in lines if line["tokens"] < 300][:3]
    long = [line["messages"] for line in lines if line["tokens"] > 1800][:1]
    score = generated(demo, iter(short + long))
    assert score.asked >= 12
    assert score.right == score.asked
