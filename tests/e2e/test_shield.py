"""Transforms through the whole engine: beside codecs, eviction and a tree of prefixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvkeep.config import DEMO_MODEL
from kvkeep.engine.api import SamplingParams
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import KvName, ShieldName
from kvkeep.shield.guarantees import describe
from tests.engines import core_for, drive, manager_of, request, tokens

LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
SCORED = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
MODES: tuple[ShieldName, ...] = ("perm", "orth", "mask")
PREFIX = 256


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def said(core: EngineCore) -> list[list[int]]:
    """Return answers to prompts cold, warm, and at once behind one prefix."""
    prompt = prompt_of(300)
    out = [tokens(drive(core, [request(prompt, LONG)])["r"]) for _ in ("cold", "warm")]
    prefix = prompt_of(PREFIX, 1)
    together = [request(prefix + prompt_of(20, i), LONG, id=str(i)) for i in range(4)]
    drive(core, [request(prefix, LONG, id="first")])
    return out + [tokens(chunks) for chunks in drive(core, together).values()]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {}),
        pytest.param("llama", {"attention_planner": "flat"}, marks=pytest.mark.slow),
        ("qwen3", {"evict": "corm", "evict_window": 16, "evict_recent": 8, "evict_weight": 4.0}),
    ],
    ids=["tree", "flat", "corm"],
)
def test_answers_are_those_without_a_shield(
    family: str, options: dict[str, object], tiny: dict[str, Path]
) -> None:
    plain = said(core_for(tiny[family], **options))  # type: ignore[arg-type]
    for mode in MODES:
        core = core_for(tiny[family], shield=mode, **options)  # type: ignore[arg-type]
        assert said(core) == plain, mode
        assert core.info.shield == describe(mode)


def test_a_pages_tag_names_the_key_it_is_under(tiny: dict[str, Path]) -> None:
    names = [
        manager_of(core_for(tiny["qwen2"], shield="perm"))._tag_of("s").shield for _ in range(2)
    ]
    assert names[0] != names[1]
    assert all(name.startswith("perm-0-") for name in names)


def prompt_scores(kv: KvName, shield: ShieldName) -> np.ndarray:
    """Return the log-probabilities of a text's tokens under the demo model."""
    core = core_for(DEMO_MODEL, kv=kv, shield=shield, dtype="float32", chunk_tokens=128)
    prompt = [int(t) for t in np.random.default_rng(5).integers(300, 1900, 640)]
    (found,) = [
        c.prompt_logprobs for c in drive(core, [request(prompt, SCORED)])["r"] if c.prompt_logprobs
    ]
    return np.array([one.logprob for one in found if one is not None])


@pytest.mark.slow
def test_codes_of_turned_rows_err_no_more_than_codes_of_plain_ones() -> None:
    exact = prompt_scores("bf16", "off")
    usual = np.abs(prompt_scores("k2v2", "off") - exact).mean()
    assert usual > 1e-3, "codes of two bits must show"
    for mode in ("perm", "orth"):
        got = np.abs(prompt_scores("k2v2", mode) - exact).mean()
        assert got <= 1.1 * usual, (mode, got / usual)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("mode", ["perm", "orth"])
def test_other_kernels_turn_heads_alike(tiny: dict[str, Path], kernel: str, mode: str) -> None:
    few = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    plain, turned = (
        drive(
            core_for(tiny["qwen2"], kernel=kernel, attention_planner="flat", shield=shield),
            [request(prompt_of(70), few)],
        )["r"]
        for shield in (None, mode)
    )
    assert tokens(turned) == tokens(plain)
