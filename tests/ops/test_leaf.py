"""RMSNorm and the gated MLP: native against reference, a row alone against a row among others."""

from __future__ import annotations

import threading

import pytest
import torch

from kvkeep import ops
from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import Heads, LeafOps
from kvkeep.ops.reference_leaf import ReferenceLeaf

kernels = pytest.mark.parametrize("kernel", ["avx512", "avx2", "portable"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("bf16", "f32"))
RELATIVE = {torch.bfloat16: 2.0**-7, torch.float32: 4e-6}
"""One unit of bf16: a float32 sum on the other side of a tie; some units of float32."""


def leaf(kernel: ops.Kernel, threads: int = 2) -> LeafOps:
    if kernel not in ops.available():
        pytest.skip(f"this CPU does not run {kernel}")
    return ops.select(kernel, threads).leaf


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@kernels
@dtypes
@pytest.mark.parametrize("width", [1, 3, 16, 31, 63, 64, 65, 128, 130, 896])
def test_rms_norm_matches_the_reference(kernel: ops.Kernel, dtype: torch.dtype, width: int) -> None:
    native, reference = leaf(kernel), ReferenceLeaf()
    weight = random(width, dtype=dtype, seed=1)
    for rows in (0, 1, 2, 37):
        x = random(rows, width, dtype=dtype, seed=rows, scale=3.0)
        got, want = native.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
        assert got.shape == x.shape
        assert got.dtype is dtype
        torch.testing.assert_close(got, want, rtol=RELATIVE[dtype], atol=0)


@kernels
@dtypes
def test_rms_norm_matches_transformers(kernel: ops.Kernel, dtype: torch.dtype) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(130, eps=1e-5).to(dtype)
    norm.weight.data = random(130, dtype=dtype, seed=1)
    x = random(5, 130, dtype=dtype, seed=2)
    with torch.no_grad():
        want = norm(x)
    got = leaf(kernel).rms_norm(x, norm.weight.data, 1e-5)
    torch.testing.assert_close(got, want, rtol=RELATIVE[dtype], atol=0)


def heads_of(dtype: torch.dtype, dim: int, *, normed: bool) -> Heads:
    if not normed:
        return Heads(6, 2, dim)
    q_norm, k_norm = (random(dim, dtype=dtype, seed=seed) for seed in (8, 9))
    return Heads(6, 2, dim, q_norm, k_norm, eps=1e-6)


def rotation(rows: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = random(rows, dim // 2, dtype=torch.float32, seed=3, scale=2.0).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@kernels
@dtypes
@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_rotated_heads_are_transformers_bits(
    kernel: ops.Kernel, dtype: torch.dtype, dim: int, rows: int
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    heads = heads_of(dtype, dim, normed=False)
    qkv = random(rows, 10 * dim, dtype=dtype, seed=rows)
    cos, sin = rotation(rows, dim, dtype)
    q, k, v = (part.transpose(0, 1)[None].clone() for part in heads.split(qkv))
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    leaf(kernel).rotate_heads(qkv, heads, cos, sin)
    for got, want in zip(heads.split(qkv), (q, k, v), strict=True):
        assert torch.equal(got, want[0].transpose(0, 1))


@kernels
@dtypes
def test_heads_are_normalised_before_they_are_rotated(
    kernel: ops.Kernel, dtype: torch.dtype
) -> None:
    native, heads = leaf(kernel), heads_of(dtype, 32, normed=True)
    cos, sin = rotation(5, 32, dtype)
    fused = random(5, 400, dtype=dtype, seed=4)
    got = fused[:, 16:336].clone()
    native.rotate_heads(got, heads, cos, sin)
    want = fused[:, 16:336].clone()
    ReferenceLeaf().rotate_heads(want, heads, cos, sin)
    torch.testing.assert_close(got, want, rtol=4 * RELATIVE[dtype], atol=RELATIVE[dtype])
    rows = fused.clone()
    native.rotate_heads(rows[:, 16:336], heads, cos, sin)
    assert torch.equal(rows[:, 16:336], got)
    assert torch.equal(rows[:, :16], fused[:, :16])
    one = fused[3:4, 16:336].clone()
    native.rotate_heads(one, heads, cos[3:4], sin[3:4])
    assert torch.equal(one[0], got[3])


@kernels
@pytest.mark.parametrize("fault", ["width", "dtype", "cos", "sin", "norm", "dense"])
def test_heads_that_do_not_fit_are_refused(kernel: ops.Kernel, fault: str) -> None:
    dtype = torch.float32
    heads = heads_of(dtype, 32, normed=True)
    qkv = random(5, 320, dtype=dtype, seed=4)
    cos, sin = rotation(5, 32, dtype)
    if fault == "width":
        qkv = qkv[:, :-32]
    elif fault == "dtype":
        qkv = qkv.half()
    elif fault == "cos":
        cos = cos[:4]
    elif fault == "sin":
        sin = sin.T.contiguous().T
    elif fault == "norm":
        heads = Heads(6, 2, 32, torch.ones(16), torch.ones(32))
    else:
        qkv = random(320, 5, dtype=dtype, seed=4).T
    with pytest.raises(KernelInputError):
        leaf(kernel).rotate_heads(qkv, heads, cos, sin)


@kernels
@dtypes
def test_rms_norm_bits_do_not_depend_on_rows_or_threads(
    kernel: ops.Kernel, dtype: torch.dtype
) -> None:
    x, weight = random(300, 131, dtype=dtype, seed=1), random(131, dtype=dtype, seed=2)
    alone = torch.cat([leaf(kernel, 1).rms_norm(x[i : i + 1], weight, 1e-6) for i in range(300)])
    for threads in (1, 2, 3):
        assert torch.equal(alone, leaf(kernel, threads).rms_norm(x, weight, 1e-6))


@kernels
@dtypes
def test_rms_norm_refuses_a_misfit(kernel: ops.Kernel, dtype: torch.dtype) -> None:
    native = leaf(kernel)
    with pytest.raises(KernelInputError, match="weight"):
        native.rms_norm(torch.zeros(2, 8, dtype=dtype), torch.zeros(7, dtype=dtype), 1e-6)
    with pytest.raises(KernelInputError, match="dtype"):
        native.rms_norm(torch.zeros(2, 8, dtype=dtype), torch.zeros(8, dtype=torch.float16), 1e-6)


@kernels
@dtypes
@pytest.mark.parametrize("shape", [(64, 128), (33, 70), (1, 1), (130, 257)])
def test_gated_mlp_matches_the_reference(
    kernel: ops.Kernel, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    width, inner = shape
    native, reference = leaf(kernel), ReferenceLeaf()
    gate_up = random(2 * inner, width, dtype=dtype, seed=1, scale=width**-0.5)
    down = random(width, inner, dtype=dtype, seed=2, scale=inner**-0.5)
    mine = native.pack(gate_up), native.pack(down)
    plain = reference.pack(gate_up), reference.pack(down)
    for rows in (0, 1, 9, 245):
        x = random(rows, width, dtype=dtype, seed=rows, scale=2.0)
        got, want = native.gated_mlp(x, *mine), reference.gated_mlp(x, *plain)
        scale = 2.0**-7 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, want, rtol=scale, atol=scale)


@kernels
@dtypes
def test_gated_mlp_bits_do_not_depend_on_rows_or_threads(
    kernel: ops.Kernel, dtype: torch.dtype
) -> None:
    width, inner, total = 70, 131, 500
    x = random(total, width, dtype=dtype, seed=1)
    gate_up = random(2 * inner, width, dtype=dtype, seed=2)
    down = random(width, inner, dtype=dtype, seed=3)
    one = leaf(kernel, 1)
    packed = one.pack(gate_up), one.pack(down)
    alone = torch.cat([one.gated_mlp(x[i : i + 1], *packed) for i in range(total)])
    for threads in (1, 2, 3):
        many = leaf(kernel, threads)
        packed = many.pack(gate_up), many.pack(down)
        for rows in (1, 2, 7, 16, 241, total):
            assert torch.equal(alone[:rows], many.gated_mlp(x[:rows], *packed)), rows


@kernels
@dtypes
def test_silu_is_exact_to_a_few_units(kernel: ops.Kernel, dtype: torch.dtype) -> None:
    gate = torch.linspace(-85, 85, 4001).to(dtype)
    native = leaf(kernel)
    eye = torch.eye(1, dtype=dtype)
    both = native.pack(
        torch.tensor([[1.0], [0.0]], dtype=dtype) + torch.tensor([[0.0], [1.0]]).to(dtype)
    )
    got = native.gated_mlp(gate[:, None], both, native.pack(eye))[:, 0]
    silu = torch.nn.functional.silu(gate.double()).to(dtype)
    want = silu * gate
    torch.testing.assert_close(got, want, rtol=RELATIVE[dtype], atol=1e-30)


@kernels
def test_gated_mlp_refuses_a_misfit(kernel: ops.Kernel) -> None:
    native = leaf(kernel)
    gate_up, down = native.pack(torch.zeros(12, 4)), native.pack(torch.zeros(4, 5))
    with pytest.raises(KernelInputError, match="gate_up"):
        native.gated_mlp(torch.zeros(2, 4), gate_up, down)


def test_threads_may_share_a_backend() -> None:
    native = leaf(ops.available()[0], 2)
    weight = random(256, 128, dtype=torch.bfloat16, seed=1)
    packed = native.pack(weight)
    inputs = [random(20, 128, dtype=torch.bfloat16, seed=i) for i in range(4)]
    want = [native.linear(x, packed, None) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        outs = [native.linear(inputs[i], packed, None) for _ in range(50)]
        wrong.extend(i for out in outs if not torch.equal(out, want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
