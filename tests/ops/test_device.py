"""The backend of a device, as it is chosen; its row-wise and sampling kernels against reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep import ops
from kvkeep.errors import ConfigError, KernelInputError
from kvkeep.ops.layout import ROW_LAYOUTS, DrawRow, Heads
from kvkeep.ops.reference_leaf import ReferenceLeaf
from kvkeep.ops.reference_sample import ReferenceSample
from kvkeep.ops.torch_leaf import TorchLeaf
from kvkeep.ops.torch_sample import TorchSample
from kvkeep.ops.upload import Uploader
from tests.ops.devices import DEVICE

THERE = torch.device(DEVICE)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("bf16", "f32"))
RELATIVE = {torch.bfloat16: 2.0**-6, torch.float32: 1e-5}


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    allowed = RELATIVE[want.dtype] * float(want.float().abs().max())
    torch.testing.assert_close(got.cpu().float(), want.float(), atol=allowed, rtol=0)


def test_the_backend_of_a_device() -> None:
    chosen = ops.select("triton", 1, "cuda" if DEVICE == "cuda" else "cpu")
    assert chosen.name == "triton"
    assert chosen.device.type == DEVICE
    assert chosen.layouts is ROW_LAYOUTS
    assert ops.select("auto", 1).device.type == "cpu"


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="device: 'cuda' needs a CUDA device"):
        ops.select("auto", 1, "cuda")


def test_kernels_of_a_cpu_are_refused_on_a_device() -> None:
    with pytest.raises(ConfigError, match="kernel: 'avx2' runs on a CPU"):
        ops.select("avx2", 1, "cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"kernel: 'triton' needs .*--device cuda"):
        ops.select("triton", 1)


def test_triton_is_not_imported_unless_asked_for() -> None:
    code = (
        "import sys; import kvkeep.engine.build; from kvkeep import ops; ops.select('auto', 1);"
        "sys.exit('kvkeep.ops.triton_attention' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


@dtypes
def test_linear_and_mlp_match_the_reference(dtype: torch.dtype) -> None:
    leaf, reference = TorchLeaf(THERE), ReferenceLeaf()
    x = random(5, 48, dtype=dtype, seed=1)
    gate_up, down = random(64, 48, dtype=dtype, seed=2) * 0.1, random(48, 32, dtype=dtype, seed=3)
    bias = random(64, dtype=dtype, seed=4)
    packed = leaf.pack(gate_up)
    assert packed.shape == (64, 48)
    assert packed.nbytes == gate_up.nbytes
    got = leaf.linear(x.to(THERE), packed, bias.to(THERE))
    close(got, reference.linear(x, reference.pack(gate_up), bias))
    close(
        leaf.gated_mlp(x.to(THERE), packed, leaf.pack(down)),
        reference.gated_mlp(x, reference.pack(gate_up), reference.pack(down)),
    )


@dtypes
@pytest.mark.parametrize("normed", [False, True])
def test_norm_and_rotation_match_the_reference(dtype: torch.dtype, *, normed: bool) -> None:
    plain = Heads(4, 2, 32, eps=1e-5)
    q_norm, k_norm = (random(32, dtype=dtype, seed=i) for i in (5, 6))
    heads = replace(plain, q_norm=q_norm, k_norm=k_norm) if normed else plain
    there = replace(plain, q_norm=q_norm.to(THERE), k_norm=k_norm.to(THERE)) if normed else plain
    qkv = random(7, 8 * 32, dtype=dtype, seed=7)
    cos, sin = random(7, 32, dtype=dtype, seed=8), random(7, 32, dtype=dtype, seed=9)
    want = qkv.clone()
    ReferenceLeaf().rotate_heads(want, heads, cos, sin)
    got = qkv.to(THERE, copy=True)
    TorchLeaf(THERE).rotate_heads(got, there, cos.to(THERE), sin.to(THERE))
    close(got, want)
    assert torch.equal(got[:, 6 * 32 :].cpu(), qkv[:, 6 * 32 :]), "values are not rotated"


def test_weights_are_checked() -> None:
    leaf = TorchLeaf(THERE)
    weight = torch.zeros(8, 16)
    with pytest.raises(ConfigError, match="weights: 'int8'"):
        leaf.pack(weight, int8=True)
    with pytest.raises(KernelInputError, match=r"\[N, K\]"):
        leaf.pack(weight[0])
    with pytest.raises(KernelInputError, match="another backend"):
        leaf.linear(torch.zeros(1, 16), ReferenceLeaf().pack(weight), None)
    with pytest.raises(KernelInputError, match="must be"):
        leaf.linear(torch.zeros(1, 8), leaf.pack(weight), None)


@dtypes
@pytest.mark.parametrize("vocab", [1, 511, 512, 513, 4099])
def test_the_largest_is_the_first_of_equals(dtype: torch.dtype, vocab: int) -> None:
    rows = [random(vocab, dtype=dtype, seed=seed) for seed in range(3)]
    rows[1][vocab // 2] = rows[1][-1] = 60.0
    got = TorchSample(THERE).largest([row.to(THERE) for row in rows])
    assert got == ReferenceSample().largest(rows)
    assert TorchSample(THERE).largest([]) == []


def test_what_is_not_finite_shows() -> None:
    nothing, broken = torch.full((9,), -math.inf), torch.zeros(9)
    broken[4] = math.nan
    first, second = TorchSample(THERE).largest([nothing, broken])
    assert first.logit == -math.inf
    assert math.isnan(second.logit)


@dtypes
@pytest.mark.parametrize("vocab", [1, 130, 512, 2000])
def test_draws_match_the_reference(dtype: torch.dtype, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows = []
    for seed in range(40):
        logits = random(vocab, dtype=dtype, seed=seed) * 2
        logits[rng.integers(0, vocab)] = -math.inf if vocab > 1 else 0.0
        bound = float(rng.choice([0.0, 0.05, 0.4]))
        ties = int(rng.integers(0, vocab + 1))
        uniform = float(rng.uniform(0.001, 0.999))
        rows.append(DrawRow(logits, float(logits.max()), 1.2, bound, ties, uniform))
    got = TorchSample(THERE).draw([row._replace(logits=row.logits.to(THERE)) for row in rows])
    want = ReferenceSample().draw(rows)
    assert [one.token for one in got] == [one.token for one in want]
    np.testing.assert_allclose([d.mass for d in got], [d.mass for d in want], rtol=1e-5)
    np.testing.assert_allclose([d.weight for d in got], [d.weight for d in want], rtol=1e-5)
    assert TorchSample(THERE).draw([]) == []


def test_nothing_kept_draws_nothing() -> None:
    row = DrawRow(torch.zeros(600).to(THERE), 0.0, 1.0, 2.0, 0, 0.5)
    assert TorchSample(THERE).draw([row])[0].token == -1


def test_rows_of_logits_are_checked() -> None:
    sample = TorchSample(THERE)
    with pytest.raises(KernelInputError, match="float16"):
        sample.largest([torch.zeros(3, dtype=torch.float16)])
    with pytest.raises(KernelInputError, match="must be"):
        sample.largest([torch.zeros(3), torch.zeros(4)])


def test_arrays_go_up_in_one_transfer_and_outgrow_the_buffer() -> None:
    upload = Uploader(THERE)
    rng = np.random.default_rng(0)
    for size in (3, 40_000):
        ints = rng.integers(0, 99, (size, 2)).astype(np.int32)
        words = rng.integers(0, 2**64, 5, np.uint64, endpoint=False)
        floats = rng.standard_normal(0).astype(np.float32)
        got = upload([ints, words, floats])
        assert np.array_equal(got[0].cpu().numpy(), ints)
        assert np.array_equal(got[1].cpu().numpy().view(np.uint64), words)
        assert got[2].shape == (0,)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in got)
    assert upload.transfers == 2


def test_arrays_that_grow_within_their_place_lie_where_they_did() -> None:
    upload = Uploader(THERE)

    def places(*sizes: int) -> list[int]:
        got = upload([np.full(size, size, np.int32) for size in sizes])
        assert [np.unique(one.cpu().numpy()).tolist() for one in got] == [[size] for size in sizes]
        return [one.data_ptr() for one in got]

    first = places(1000, 5, 70)
    assert all(places(1000 + grown, 5 + grown, 70 + grown) == first for grown in range(1, 25))
    assert places(1025, 5, 70) != first
    large = (1 << 18) + 1
    assert np.diff(places(large, 5))[0] == 2 << 20, "a mebibyte at a time"
