"""Transformed attention is plain attention, and what a page shows is not the model's rows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kvkeep.models.loader import load
from kvkeep.models.make import tiny
from kvkeep.ops import select
from kvkeep.ops.layout import Heads
from kvkeep.shield.policy import NoShield, Shield, Transform
from kvkeep.shield.transform import LinearShield, TransformName
from tests.models.fakes import DenseKV

KEY = bytes(range(32))
MODES: tuple[TransformName, ...] = ("perm", "orth", "mask")
TOKENS = 96
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "RoPE scaling": ("llama", {}),
    "biases": ("qwen2", {}),
    "q and k norms": ("qwen3", {}),
    "one KV head": ("mistral", {}),
    **{f"head_dim {dim}": ("qwen3", {"head_dim": dim}) for dim in (64, 80, 96, 128)},
}
DtypeName = Literal["float32", "bfloat16"]


class ShieldedKV(DenseKV):
    """A dense cache that holds what a shield lets lie in memory."""

    def under(self, transform: Transform) -> ShieldedKV:
        self.transform = transform
        return self

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        stored = self.transform.transform
        super().append(layer, stored(k, "k", layer), stored(v, "v", layer))

    def attend(self, layer: int, q: Tensor) -> Tensor:
        out = super().attend(layer, self.transform.transform(q, "q", layer))
        return self.transform.restore(out, layer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Path:
        family, overrides = MODELS[name]
        path = tmp_path_factory.mktemp("shielded") / "m"
        shape = {"num_hidden_layers": 2, **overrides}
        return tiny(family, path, dtype="bfloat16", overrides=shape)

    return make


def logits(path: Path, shield: Shield, dtype: DtypeName) -> tuple[Tensor, ShieldedKV]:
    ops = select("auto", 2)
    model = load(path, ops=ops, dtype=dtype, folds=shield.folds)
    kv = ShieldedKV([TOKENS]).under(shield.on(model.spec.heads, ops))
    ids = torch.randint(0, 500, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return model.forward(ids, torch.arange(TOKENS), kv, None).double(), kv


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


SELDOM = ("one KV head", "head_dim 64", "head_dim 96")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow if name in SELDOM else ()) for name in MODELS]
)
def test_in_float32_logits_are_those_without_a_shield(name: str, checkpoint: Any) -> None:
    path = checkpoint(name)
    plain, kv = logits(path, NoShield(), "float32")
    for mode, fold in ((MODES[0], True), (MODES[1], True), (MODES[2], False)):
        got, stored = logits(path, LinearShield(mode, KEY, fold=fold), "float32")
        assert apart(got, plain) <= 1e-5, (mode, fold)
        for mine, theirs in ((stored.keys, kv.keys), (stored.values, kv.values)):
            assert all(apart(mine[at], theirs[at]) > 0.3 for at in mine), (mode, fold)


@pytest.mark.parametrize(
    "name",
    [
        "biases",
        "head_dim 128",
        *(pytest.param(n, marks=slow) for n in ("RoPE scaling", "head_dim 80")),
    ],
)
def test_in_bfloat16_errors_hardly_grow(name: str, checkpoint: Any) -> None:
    path = checkpoint(name)
    exact, _ = logits(path, NoShield(), "float32")
    usual = apart(logits(path, NoShield(), "bfloat16")[0], exact)
    limits: dict[TransformName, float] = {"perm": 1.05, "orth": 1.3}
    for mode, most in limits.items():
        got = apart(logits(path, LinearShield(mode, KEY), "bfloat16")[0], exact)
        assert got <= most * usual, (mode, got / usual)


def test_pages_are_the_same_folded_or_not(checkpoint: Any) -> None:
    path = checkpoint("biases")
    for mode in MODES:
        _, folded = logits(path, LinearShield(mode, KEY), "float32")
        _, later = logits(path, LinearShield(mode, KEY, fold=False), "float32")
        for mine, theirs in ((folded.keys, later.keys), (folded.values, later.values)):
            assert all(apart(mine[at], theirs[at]) < 1e-5 for at in mine), mode


def test_another_key_epoch_or_mode_is_another_name_and_another_map() -> None:
    heads, ops = Heads(4, 2, 64), select("reference", 1)
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(1))
    shields = [
        LinearShield("perm", KEY),
        LinearShield("perm", KEY, 1),
        LinearShield("perm", bytes(32)),
        LinearShield("orth", KEY),
    ]
    assert len({shield.name for shield in shields}) == 4
    stored = [shield.on(heads, ops).transform(x, "k", 0) for shield in shields]
    assert all(not torch.allclose(a, b) for i, a in enumerate(stored) for b in stored[i + 1 :])
    again = LinearShield("orth", KEY)
    assert again.name == shields[3].name
    assert torch.equal(again.on(heads, ops).transform(x, "k", 0), stored[3])


@pytest.mark.parametrize("mode", MODES)
def test_layers_heads_keys_and_values_have_maps_of_their_own(mode: TransformName) -> None:
    heads, ops = Heads(4, 2, 64), select("reference", 1)
    shield = LinearShield(mode, KEY, fold=False)
    for size in shield.folds(heads):
        for layer in (0, 1):
            for part in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
                size.apply(f"model.layers.{layer}.{part}", torch.ones(128, 32))
            size.apply(f"model.layers.{layer}.input_layernorm.weight", torch.ones(32))
    work = shield.on(heads, ops)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).expand(5, 2, 64)
    rows = [work.transform(x, role, layer)[0] for role in ("k", "v") for layer in (0, 1)]
    found = torch.cat(rows)
    assert len(found) == 8
    gaps = torch.cdist(found, found) + 100 * torch.eye(8)
    assert float(gaps.min()) > 1.0


def test_a_groups_queries_share_their_heads_map() -> None:
    ops = select("auto", 1)
    work = LinearShield("orth", KEY).on(Heads(6, 2, 64), ops)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    queries = work.transform(x.expand(3, 6, 64), "q", 0)
    keys = work.transform(x.expand(3, 2, 64), "k", 0)
    assert torch.equal(queries, keys.repeat_interleave(3, 1))


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no transform"):
        LinearShield("rht1", KEY)  # type: ignore[arg-type]
