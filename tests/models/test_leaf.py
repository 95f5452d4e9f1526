from __future__ import annotations

import torch

from kvkeep.models.leaf import GatedMLP, Packing, RotaryEmbedding
from kvkeep.ops import Ops


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
