from __future__ import annotations

import pytest
import torch

from kvkeep.models.leaf import (
    GatedMLP,
    GroupHead,
    GroupMember,
    LinearGroup,
    Packing,
    RotaryEmbedding,
)
from kvkeep.ops import Ops


def test_group_members_compute_their_own_linear(ops: Ops) -> None:
    sizes, width = (6, 2, 2), 8
    group = LinearGroup(Packing(ops.leaf), sizes)
    leaves = [
        GroupHead(group, {"weight": (6, width)}),
        GroupMember(group, 1, {"weight": (2, width), "bias": (2,)}),
        GroupMember(group, 2, {"weight": (2, width)}),
    ]
    weights = [torch.randn(size, width) for size in sizes]
    bias = torch.randn(2)
    leaves[1].fill("bias", bias)
    for leaf, weight in reversed(list(zip(leaves, weights, strict=True))):
        leaf.fill("weight", weight)
    x = torch.randn(1, 5, width)
    want = [x @ weight.T for weight in weights]
    want[1] += bias
    for leaf, part in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf(x), part)
    assert sum(leaf.read_bytes for leaf in leaves) == 4 * 10 * width


def test_group_members_refuse_another_input(ops: Ops) -> None:
    group = LinearGroup(Packing(ops.leaf), (2, 2))
    head, member = GroupHead(group, {"weight": (2, 4)}), GroupMember(group, 1, {"weight": (2, 4)})
    for leaf in (head, member):
        leaf.fill("weight", torch.randn(2, 4))
    x = torch.randn(1, 1, 4)
    head(x)
    with pytest.raises(RuntimeError, match="different inputs"):
        member(x.clone())
    member(x)
    with pytest.raises(RuntimeError, match="different inputs"):
        member(x)


def test_gated_mlp_is_ready_only_when_whole(ops: Ops) -> None:
    mlp = GatedMLP(Packing(ops.leaf), 8, 12)
    gate, up, down = torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)
    mlp.fill("down_proj.weight", down)
    mlp.fill("gate_proj.weight", gate)
    assert mlp.read_bytes == 0
    mlp.fill("up_proj.weight", up)
    assert mlp.read_bytes == 4 * 3 * 96
    x = torch.randn(1, 3, 8)
    want = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x), want)


def test_rotations_do_not_depend_on_the_step() -> None:
    inv_freq = 1.0 / (1e6 ** (torch.arange(0, 64, 2).float() / 64))
    rotary = RotaryEmbedding(inv_freq, 1.0, 4096, torch.float32)
    positions = torch.randint(0, 4096, (1, 333))
    cos, sin = rotary(torch.empty(0), positions)
    assert cos.shape == sin.shape == (1, 333, 64)
    for i in (0, 7, 332):
        one_cos, one_sin = rotary(torch.empty(0), positions[:, i : i + 1])
        assert torch.equal(one_cos[0, 0], cos[0, i])
        assert torch.equal(one_sin[0, 0], sin[0, i])
    angles = positions[0, :, None].float() * inv_freq
    torch.testing.assert_close(cos[0, :, :32], angles.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0, :, 32:], angles.sin(), atol=1e-6, rtol=0)


def test_rotation_scaling_is_applied_once() -> None:
    plain, scaled = (RotaryEmbedding(torch.ones(4), s, 8, torch.float32) for s in (1.0, 2.0))
    at = torch.tensor([[3]])
    torch.testing.assert_close(scaled(at, at)[0], 2 * plain(at, at)[0])
