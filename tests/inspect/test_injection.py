from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvkeep.config import DEMO_MODEL
from kvkeep.engine.options import EngineOptions
from kvkeep.inspect.injection import inject, steal
from kvkeep.models.text import TextModel
from kvkeep.shield.policy import NoShield, Shield
from kvkeep.shield.transform import LinearShield
from tests.engines import core_for, drive, request, tokens

OPTIONS = EngineOptions(model=str(DEMO_MODEL), threads=2, kv_cache_bytes=64 << 20)
TOKENS = 6


@pytest.fixture(scope="module")
def asked() -> list[int]:
    """Return a held-out prompt of the demo model: a text, and a question about it at the end."""
    line = (Path(DEMO_MODEL) / "heldout.jsonl").read_text().splitlines()[0]
    text = TextModel.load(Path(DEMO_MODEL))
    return list(text.apply_chat(json.loads(line)["messages"][:2]))


@pytest.fixture(scope="module")
def answer(asked: list[int]) -> list[int]:
    chunks = drive(core_for(DEMO_MODEL), [request(asked)])["r"]
    return tokens(chunks)[:TOKENS]


@pytest.mark.parametrize("mode", ["plain", pytest.param("perm", marks=pytest.mark.slow), "orth"])
def test_a_model_tells_what_plain_pages_hold_and_turned_ones_do_not(
    asked: list[int], answer: list[int], mode: str
) -> None:
    shield: Shield = NoShield() if mode == "plain" else LinearShield(mode, bytes(32))  # type: ignore[arg-type]
    stolen = steal(OPTIONS, shield, asked)
    said = inject(OPTIONS, stolen, asked[stolen.k.shape[1] :], TOKENS)
    assert (said == answer) == (mode == "plain")
