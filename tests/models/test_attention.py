from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from kvkeep.models.attention import Geometry, SelfAttention
from kvkeep.models.leaf import Packing
from kvkeep.ops import Ops
from tests.models.fakes import DenseKV

ROWS, HIDDEN, DIM = 7, 48, 16


def pair(family: str, ops: Ops, **fields: object) -> tuple[torch.nn.Module, SelfAttention]:
    """Return transformers' module and the leaf holding the same tensors."""
    config = AutoConfig.for_model(
        family,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=DIM,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        **fields,
    )
    module = {"qwen2": Qwen2Attention, "qwen3": Qwen3Attention}[family](config, layer_idx=3)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    tensors = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    leaf = SelfAttention(Packing(ops.leaf), shapes, Geometry(3, DIM, 1e-5))
    for name in reversed(list(tensors)):
        leaf.fill(name, tensors[name])
    return module, leaf


@pytest.mark.parametrize(
    ("family", "fields"),
    [("qwen2", {}), ("qwen3", {}), ("qwen3", {"attention_bias": True})],
)
@torch.inference_mode()
def test_the_leaf_is_transformers_module(family: str, fields: dict[str, object], ops: Ops) -> None:
    module, leaf = pair(family, ops, **fields)
    x = torch.randn(1, ROWS, HIDDEN)
    angles = torch.randn(1, ROWS, DIM // 2).repeat(1, 1, 2)
    cos_sin = angles.cos(), angles.sin()
    want, _ = module(x, cos_sin, attention_mask=None)
    kv = DenseKV([ROWS])
    got, _ = leaf(x, cos_sin, kv, attention_mask=None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert list(kv.keys) == [(3, 0)]


def test_a_bias_on_one_projection_leaves_the_others_alone(ops: Ops) -> None:
    _, leaf = pair("qwen2", ops)
    tensors = {
        f"{name}.weight": torch.randn(n, HIDDEN)
        for name, n in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32))
    }
    tensors |= {"k_proj.bias": torch.randn(32), "o_proj.weight": torch.randn(HIDDEN, 64)}
    leaf.build(tensors)
    kv = DenseKV([1])
    x = torch.randn(1, 1, HIDDEN)
    leaf(x, (torch.ones(1, 1, DIM), torch.zeros(1, 1, DIM)), kv)
    want = x[0] @ tensors["k_proj.weight"].T + tensors["k_proj.bias"]
    torch.testing.assert_close(kv.keys[3, 0].reshape(1, 32), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        kv.values[3, 0].reshape(1, 32), x[0] @ tensors["v_proj.weight"].T, rtol=1e-4, atol=1e-4
    )
