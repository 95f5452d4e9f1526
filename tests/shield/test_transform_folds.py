from __future__ import annotations

import pytest
import torch

from kvkeep.ops.layout import Heads
from kvkeep.ops.turns import Orders
from kvkeep.shield.transform import LinearShield, Secrets
from kvkeep.shield.transform_folds import FoldValues, KVSizes

HEADS = Heads(4, 2, 16)
KEY = bytes(range(32))


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_only_values_and_the_outputs_columns_change() -> None:
    fold = FoldValues(HEADS, Secrets("perm", KEY, 0).turns)
    for part in ("q_proj.weight", "k_proj.weight", "k_proj.bias", "o_proj.bias", "k_norm.weight"):
        tensor = weight(32, 24)
        assert fold.apply(f"model.layers.0.self_attn.{part}", tensor) is tensor
    tensor = weight(32, 24)
    assert fold.apply("model.layers.0.mlp.up_proj.weight", tensor) is tensor
    assert fold.apply("model.embed_tokens.weight", tensor) is tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_permutation_moves_weights_and_changes_none(dtype: torch.dtype) -> None:
    secrets = Secrets("perm", KEY, 0)
    fold, turns = FoldValues(HEADS, secrets.turns), secrets.turns("v", 3, HEADS)
    assert isinstance(turns, Orders)
    rows = torch.cat([turns.order[head] + 16 * head for head in range(2)]).long()
    values, bias = weight(32, 24).to(dtype), weight(32, seed=1).to(dtype)
    name = "model.layers.3.self_attn.v_proj"
    assert torch.equal(fold.apply(f"{name}.weight", values), values[rows])
    assert torch.equal(fold.apply(f"{name}.bias", bias), bias[rows])
    out = weight(24, 64).to(dtype)
    columns = torch.cat([turns.order[head // 2] + 16 * head for head in range(4)]).long()
    folded = fold.apply("model.layers.3.self_attn.o_proj.weight", out)
    assert torch.equal(folded, out[:, columns])


def test_folded_weights_tell_the_key_to_whoever_has_the_public_ones() -> None:
    secrets = Secrets("orth", KEY, 0)
    public = weight(32, 200)
    folded = FoldValues(HEADS, secrets.turns).apply(
        "model.layers.0.self_attn.v_proj.weight", public
    )
    found = torch.linalg.lstsq(public[:16].T.double(), folded[:16].T.double()).solution
    torch.testing.assert_close(found, secrets.turns("v", 0, HEADS).matrices()[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", ["norm", "projection"])
def test_sizes_are_those_of_normalised_states(first: str) -> None:
    sizes = KVSizes()
    projection, norm, bias = weight(32, 4096), weight(4096, seed=1).abs(), weight(32, seed=2)
    names = ["model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight"]
    given = [norm, projection]
    for at in (0, 1) if first == "norm" else (1, 0):
        assert sizes.apply(names[at], given[at]) is given[at]
    sizes.apply("model.layers.1.self_attn.k_proj.bias", bias)
    state = weight(3000, 4096, seed=3)
    keys = (state / state.square().mean(1, keepdim=True).sqrt() * norm) @ projection.T + bias
    seen = keys.view(3000, 2, 16).square().mean((0, 2)).sqrt().double()
    torch.testing.assert_close(sizes.of("k", 1, HEADS), seen, rtol=0.03, atol=0)


def test_the_size_of_normalised_keys_is_their_norms() -> None:
    sizes = KVSizes()
    sizes.apply("model.layers.0.self_attn.k_norm.weight", torch.full((16,), 3.0))
    assert sizes.of("k", 0, HEADS).tolist() == [3.0, 3.0]


def test_without_folding_nothing_of_the_model_changes() -> None:
    assert LinearShield("orth", KEY, fold=False).folds(HEADS) == ()
    (only,) = LinearShield("mask", KEY, fold=False).folds(HEADS)
    assert isinstance(only, KVSizes)
