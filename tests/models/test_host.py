from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging

from kvkeep.models.host import HostedModel
from kvkeep.models.loader import load
from kvkeep.models.make import tiny
from kvkeep.models.shapes import TINY
from kvkeep.ops import Kernel, Ops, available, select
from tests.models.fakes import DenseKV

logging.disable_progress_bar()
LENGTHS = [1, 23, 9]


def prompts(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 500, (n,), generator=generator) for n in lengths]


def expected(path: Path, requests: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return transformers' own logits, one request at a time."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return torch.cat([reference(ids[None]).logits[0] for ids in requests])


def flat(model: HostedModel, requests: list[Tensor], rows: Tensor | None = None) -> Tensor:
    positions = [torch.arange(len(ids)) for ids in requests]
    kv = DenseKV([len(ids) for ids in requests])
    return model.forward(torch.cat(requests), torch.cat(positions), kv, rows)


@pytest.mark.parametrize("kernel", ["reference", *available()])
@pytest.mark.parametrize("family", sorted(TINY))
def test_flattened_requests_have_transformers_logits(
    family: str, kernel: Kernel, shared: Callable[[str], Path]
) -> None:
    requests = prompts(LENGTHS)
    want = expected(shared(family), requests)
    got = flat(load(shared(family), ops=select(kernel, 1)), requests)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", sorted(TINY))
def test_untied_heads(family: str, ops: Ops, tmp_path: Path) -> None:
    path = tiny(family, tmp_path / "m", tied=False)
    requests = prompts(LENGTHS)
    got = flat(load(path, ops=ops), requests)
    torch.testing.assert_close(got, expected(path, requests), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(TINY))
def test_rows_do_not_depend_on_their_neighbours(
    family: str, dtype: Literal["float32", "bfloat16"], shared: Callable[[str], Path]
) -> None:
    model = load(shared(family), ops=select("auto", 2), dtype=dtype)
    requests = prompts(LENGTHS)
    together = flat(model, requests).split_with_sizes(LENGTHS)
    for ids, part in zip(requests, together, strict=True):
        assert torch.equal(flat(model, [ids]), part)


def test_decoding_row_by_row_equals_one_prefill(ops: Ops, shared: Callable[[str], Path]) -> None:
    model = load(shared("qwen3_moe"), ops=ops)
    (ids,) = prompts([12])
    kv = DenseKV([1])
    steps = [model.forward(ids[i : i + 1], torch.tensor([i]), kv, None) for i in range(len(ids))]
    torch.testing.assert_close(torch.cat(steps), flat(model, [ids]), atol=1e-5, rtol=0)


def test_logits_only_for_the_rows_asked_for(ops: Ops, shared: Callable[[str], Path]) -> None:
    model = load(shared("llama"), ops=ops)
    requests = prompts(LENGTHS)
    rows = torch.tensor([0, 23, 32])
    picked = flat(model, requests, rows)
    assert picked.shape == (3, model.spec.vocab_size)
    assert torch.equal(picked, flat(model, requests)[rows])


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "old-style": {"type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=list(ROPES))
def test_scaled_rotations_equal_transformers(
    rope: dict[str, object], ops: Ops, tmp_path: Path
) -> None:
    path = tiny("qwen2", tmp_path / "m", overrides={"rope_scaling": rope, "rope_theta": 10000.0})
    requests = prompts([80])
    got = flat(load(path, ops=ops), requests)
    torch.testing.assert_close(got, expected(path, requests), atol=1e-4, rtol=0)
    plain = tiny("qwen2", tmp_path / "plain")
    assert not torch.allclose(got, flat(load(plain, ops=ops), requests), atol=1e-2)


def test_bfloat16_stays_close_to_transformers(ops: Ops, tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m", dtype="bfloat16")
    model = load(path, ops=ops)
    requests = prompts(LENGTHS)
    got = flat(model, requests)
    assert model.spec.dtype == got.dtype == torch.bfloat16
    exact = expected(path, requests)
    theirs = (expected(path, requests, torch.bfloat16) - exact).abs().max()
    assert (got - exact).abs().max() < 2 * theirs


@pytest.mark.parametrize(("weights", "most"), [("float", 1e-4), ("int8", 0.2)])
def test_int8_weights_stay_close(
    weights: Literal["float", "int8"], most: float, ops: Ops, shared: Callable[[str], Path]
) -> None:
    requests = prompts(LENGTHS)
    got = flat(load(shared("qwen2"), ops=ops, weights=weights), requests)
    error = (got - expected(shared("qwen2"), requests)).abs().max()
    assert error < most
    assert weights == "float" or error > 1e-4


def test_routing_weights_without_normalisation(ops: Ops, tmp_path: Path) -> None:
    overrides = {"norm_topk_prob": False, "mlp_only_layers": [1]}
    path = tiny("qwen3_moe", tmp_path / "m", overrides=overrides)
    requests = prompts(LENGTHS)
    got = flat(load(path, ops=ops), requests)
    torch.testing.assert_close(got, expected(path, requests), atol=1e-4, rtol=0)


def test_attention_bias_is_applied(ops: Ops, tmp_path: Path) -> None:
    path = tiny("qwen3", tmp_path / "m", overrides={"attention_bias": True})
    requests = prompts(LENGTHS)
    got = flat(load(path, ops=ops), requests)
    torch.testing.assert_close(got, expected(path, requests), atol=1e-4, rtol=0)


def test_attention_is_registered_and_builds_no_mask(
    ops: Ops, shared: Callable[[str], Path]
) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    load(shared("llama"), ops=ops)
    assert "kvkeep" in AttentionInterface().valid_keys()
    assert "kvkeep" not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


def test_positions_beyond_the_table_fail(ops: Ops, shared: Callable[[str], Path]) -> None:
    model = load(shared("llama"), ops=ops)
    with pytest.raises(IndexError):
        model.forward(
            torch.tensor([1]), torch.tensor([model.spec.max_model_len]), DenseKV([1]), None
        )
