from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvkeep.errors import CheckpointError, UnsupportedModel
from kvkeep.models.checkpoint import SINGLE_NAME
from kvkeep.models.loader import load
from kvkeep.models.make import tiny
from kvkeep.ops import Ops
from tests.models.test_host import LENGTHS, flat, prompts


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / SINGLE_NAME)
    change(tensors)
    save_file(tensors, path / SINGLE_NAME)


def test_spec_describes_the_checkpoint(ops: Ops, shared: Callable[[str], Path]) -> None:
    spec = load(shared("qwen3_moe"), ops=ops).spec
    assert (spec.family, spec.num_layers, spec.num_heads) == ("qwen3_moe", 3, 4)
    assert (spec.num_kv_heads, spec.head_dim, spec.hidden_size) == (2, 32, 64)
    assert (spec.vocab_size, spec.max_model_len) == (512, 4096)
    assert spec.eos_token_ids == (511, 509)
    assert len(spec.digest) == 32
    assert spec.num_params == 218_496
    assert spec.weight_bytes == 4 * spec.num_params


def test_missing_tensor_is_named(ops: Ops, broken: Path) -> None:
    edit_weights(broken, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj"):
        load(broken, ops=ops)


def test_missing_head_is_named(ops: Ops, broken: Path) -> None:
    edit_config(broken, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        load(broken, ops=ops)


def test_unexpected_tensors_are_named_and_counted(ops: Ops, broken: Path) -> None:
    extra = {f"model.layers.{i}.extra": torch.zeros(1) for i in range(5)}
    edit_weights(broken, lambda t: t.update(extra))
    with pytest.raises(CheckpointError, match=r"holds tensor model\.layers\.0\.extra.* and 2 more"):
        load(broken, ops=ops)


def test_stored_rotations_are_ignored(ops: Ops, broken: Path) -> None:
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    edit_weights(broken, lambda t: t.update(stored))
    assert load(broken, ops=ops).spec.num_layers == 3


def test_wrong_shape_is_named(ops: Ops, broken: Path) -> None:
    edit_weights(broken, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[7\]"):
        load(broken, ops=ops)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"head_dim": 8, "num_attention_heads": 12}, UnsupportedModel, "`head_dim` is 8"),
        ({"num_key_value_heads": 4}, CheckpointError, "`num_key_value_heads`"),
        ({"dtype": "float16"}, UnsupportedModel, "`dtype` is 'float16'"),
        ({"rms_norm_eps": "small"}, CheckpointError, "field 'rms_norm_eps'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, CheckpointError, r"config\.json is not valid"),
    ],
    ids=["head_dim", "kv_heads", "float16", "types", "rope"],
)
def test_configs_the_kernels_cannot_serve(
    ops: Ops, broken: Path, fields: dict[str, object], error: type[Exception], says: str
) -> None:
    edit_config(broken, **fields)
    with pytest.raises(error, match=says):
        load(broken, ops=ops)


@pytest.mark.parametrize(
    ("generation", "ids"),
    [("{}", (511,)), ('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [7, 8]}', (7, 8))],
)
def test_end_tokens_come_from_the_generation_config_first(
    ops: Ops, broken: Path, generation: str, ids: tuple[int, ...]
) -> None:
    (broken / "generation_config.json").write_text(generation)
    assert load(broken, ops=ops).spec.eos_token_ids == ids


def test_a_model_may_have_no_end_token(ops: Ops, broken: Path) -> None:
    (broken / "generation_config.json").unlink()
    edit_config(broken, eos_token_id=None)
    assert load(broken, ops=ops).spec.eos_token_ids == ()


def test_malformed_end_tokens(ops: Ops, broken: Path) -> None:
    (broken / "generation_config.json").write_text('{"eos_token_id": ["stop"]}')
    with pytest.raises(CheckpointError, match="`eos_token_id`"):
        load(broken, ops=ops)


def test_float16_loads_when_a_dtype_is_chosen(ops: Ops, broken: Path) -> None:
    edit_config(broken, dtype="float16")
    assert load(broken, ops=ops, dtype="float32").spec.dtype == torch.float32


def test_dtype_follows_the_tensors_where_the_config_is_silent(ops: Ops, tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m", dtype="bfloat16")
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    assert load(path, ops=ops).spec.dtype == torch.bfloat16


def test_sharded_equals_single(ops: Ops, tmp_path: Path) -> None:
    one = load(tiny("qwen3_moe", tmp_path / "one"), ops=ops)
    several = load(tiny("qwen3_moe", tmp_path / "several", shard_bytes=100_000), ops=ops)
    requests = prompts(LENGTHS)
    assert torch.equal(flat(one, requests), flat(several, requests))


def test_a_stored_head_comes_before_the_tie(ops: Ops, broken: Path) -> None:
    tied = flat(load(broken, ops=ops), prompts(LENGTHS))
    edit_weights(broken, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
    torch.testing.assert_close(flat(load(broken, ops=ops), prompts(LENGTHS)), 2 * tied)


def test_identity_depends_on_weights_dtype_and_packing(ops: Ops, broken: Path) -> None:
    digests = [
        load(broken, ops=ops).spec.digest,
        load(broken, ops=ops, dtype="bfloat16").spec.digest,
        load(broken, ops=ops, weights="int8").spec.digest,
    ]
    assert load(broken, ops=ops).spec.digest == digests[0]
    edit_weights(broken, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + 1}))
    digests.append(load(broken, ops=ops).spec.digest)
    assert len(set(digests)) == 4


class Scale:
    """Multiplies the weights of some tensors and remembers what it saw."""

    def __init__(self, ending: str, by: float) -> None:
        self.ending, self.by = ending, by
        self.seen: list[str] = []

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        self.seen.append(name)
        return tensor * self.by if name.endswith(self.ending) else tensor


def test_folds_see_every_tensor_in_order_before_packing(ops: Ops, broken: Path) -> None:
    folds = [Scale("v_proj.weight", 4.0), Scale("v_proj.bias", 4.0), Scale("o_proj.weight", 0.25)]
    requests = prompts(LENGTHS)
    plain = flat(load(broken, ops=ops), requests)
    folded = flat(load(broken, ops=ops, folds=lambda _: folds), requests)
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=0)
    changed = flat(load(broken, ops=ops, folds=lambda _: folds[:1]), requests)
    assert not torch.allclose(changed, plain, atol=1e-2)
    names = set(load_file(broken / SINGLE_NAME)) | {"lm_head.weight"}
    assert set(folds[1].seen) == names
    assert len(folds[1].seen) == len(names)


def test_progress_ends_at_the_total(ops: Ops, broken: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(broken, ops=ops, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in load_file(broken / SINGLE_NAME).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
