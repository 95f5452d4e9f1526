"""The linear layer: native against reference, and the promise that a row's bits are its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep import ops
from kvkeep.errors import ConfigError, KernelInputError
from kvkeep.ops.layout import LeafOps
from kvkeep.ops.reference_leaf import ReferenceLeaf
from tests.counts import examples

DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6}
"""Of the sum of absolute products: half a unit of bf16 and what float32 sums lose."""


def leaf(kernel: ops.Kernel, threads: int = 2) -> LeafOps:
    if kernel not in ops.available():
        pytest.skip(f"this CPU does not run {kernel}")
    return ops.select(kernel, threads).leaf


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32)


def assert_close(
    got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> None:
    error = (got.double() - want.double()).abs()
    assert (error <= TOLERANCE[dtype] * scale.double() + 1e-30).all(), (error / scale).max()


kernels = pytest.mark.parametrize("kernel", ["avx512", "avx2", "portable"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("bf16", "f32"))
int8s = pytest.mark.parametrize("int8", [False, True], ids=("float", "int8"))


@kernels
@dtypes
@int8s
@pytest.mark.parametrize("has_bias", [False, True], ids=("plain", "bias"))
def test_bits_do_not_depend_on_rows_threads_or_place(
    kernel: ops.Kernel, dtype: torch.dtype, int8: bool, has_bias: bool
) -> None:
    k, n, total = 301, 150, 1100
    x = random(total, k, dtype=dtype, seed=1)
    weight = random(n, k, dtype=dtype, seed=2)
    bias = random(n, dtype=dtype, seed=3) if has_bias else None
    alone = leaf(kernel, 1)
    packed = alone.pack(weight, int8=int8)
    want = torch.cat([alone.linear(x[i : i + 1], packed, bias) for i in range(total)])
    for threads in (1, 2, 3):
        many = leaf(kernel, threads)
        packed = many.pack(weight, int8=int8)
        for rows in (*range(1, 18), 63, 64, 65, 240, 241, total):
            for first in {0, 5, total - rows}:
                if first + rows > total:
                    continue
                got = many.linear(x[first : first + rows], packed, bias)
                assert torch.equal(bits(got), bits(want[first : first + rows])), (rows, first)


@kernels
@dtypes
@int8s
@pytest.mark.parametrize("k", [1, 2, 63, 128, 129, 897])
@pytest.mark.parametrize("n", [1, 16, 17, 65, 130])
def test_matches_the_reference(
    kernel: ops.Kernel, dtype: torch.dtype, int8: bool, k: int, n: int
) -> None:
    native, reference = leaf(kernel), ReferenceLeaf()
    weight, bias = random(n, k, dtype=dtype, seed=k), random(n, dtype=dtype, seed=n)
    packed, plain = native.pack(weight, int8=int8), reference.pack(weight, int8=int8)
    assert packed.shape == (n, k)
    for rows in (0, 1, 6, 7, 13):
        x = random(rows, k, dtype=dtype, seed=rows)
        scale = x.float().abs() @ weight.float().abs().T + bias.float().abs()
        for b in (None, bias):
            got = native.linear(x, packed, b)
            assert got.shape == (rows, n)
            assert got.dtype is dtype
            assert_close(got, reference.linear(x, plain, b), scale, dtype)


@kernels
@settings(max_examples=examples(12, 30), deadline=None)
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 200),
    n=st.integers(1, 150),
    pad=st.integers(0, 5),
    bf16=st.booleans(),
    int8=st.booleans(),
)
def test_strided_rows_give_the_bits_of_dense_ones(
    kernel: ops.Kernel, rows: int, k: int, n: int, pad: int, bf16: bool, int8: bool
) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    native = leaf(kernel)
    wide = random(rows, k + pad, dtype=dtype, seed=7)
    x = wide[:, pad:]
    weight = random(n, k + pad, dtype=dtype, seed=8)[:, :k]
    packed = native.pack(weight, int8=int8)
    got = native.linear(x, packed, None)
    assert torch.equal(bits(got), bits(native.linear(x.contiguous(), packed, None)))
    across = x.t().contiguous().t()
    assert torch.equal(bits(got), bits(native.linear(across, packed, None)))
    dense = native.pack(weight.contiguous(), int8=int8)
    assert torch.equal(bits(got), bits(native.linear(x, dense, None)))


@kernels
@dtypes
def test_int8_weights_are_exact_multiples_of_their_scale(
    kernel: ops.Kernel, dtype: torch.dtype
) -> None:
    codes = torch.arange(-127, 128, dtype=torch.float32)
    weight = torch.stack([codes * 0.5, codes * 4.0, codes * 0.0]).to(dtype)
    native = leaf(kernel)
    packed = native.pack(weight, int8=True)
    got = native.linear(torch.eye(255, dtype=dtype), packed, None)
    assert torch.equal(got.T.float(), weight.float())


@kernels
def test_bf16_outputs_round_to_nearest_even(kernel: ops.Kernel) -> None:
    native = leaf(kernel)
    x = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8], [-1.0, -(2.0**-8)]], dtype=torch.bfloat16)
    got = native.linear(x, native.pack(torch.ones(1, 2, dtype=torch.bfloat16)), None)
    assert got.flatten().tolist() == [1.0, 1.0 + 2.0**-6, -1.0]


@kernels
@dtypes
def test_infinities_and_nans_stay_in_their_own_row(kernel: ops.Kernel, dtype: torch.dtype) -> None:
    native = leaf(kernel)
    packed = native.pack(random(70, 33, dtype=dtype, seed=1))
    x = random(9, 33, dtype=dtype, seed=2)
    want = native.linear(x, packed, None)
    x[3, 5], x[4, 32] = float("nan"), float("inf")
    got = native.linear(x, packed, None)
    assert got[3].isnan().all()
    assert not got[4].isfinite().any()
    keep = [0, 1, 2, 5, 6, 7, 8]
    assert torch.equal(bits(got[keep]), bits(want[keep]))


@kernels
def test_packed_size_is_what_is_read(kernel: ops.Kernel) -> None:
    native = leaf(kernel)
    weight = random(128, 64, dtype=torch.bfloat16, seed=1)
    assert native.pack(weight).nbytes == 128 * 64 * 2
    assert native.pack(weight, int8=True).nbytes == 128 * 64 + 128 * 4
    assert native.pack(weight.float()).nbytes == 128 * 64 * 4


@kernels
def test_misfits_are_refused(kernel: ops.Kernel) -> None:
    native = leaf(kernel)
    packed = native.pack(torch.zeros(8, 4))
    with pytest.raises(KernelInputError, match=r"x .* must be \[T, 4\]"):
        native.linear(torch.zeros(2, 5), packed, None)
    with pytest.raises(KernelInputError, match=r"x .* must be \[T, 4\]"):
        native.linear(torch.zeros(4), packed, None)
    with pytest.raises(KernelInputError, match="float32"):
        native.linear(torch.zeros(2, 4, dtype=torch.bfloat16), packed, None)
    with pytest.raises(KernelInputError, match=r"bias .* must be \[8\]"):
        native.linear(torch.zeros(2, 4), packed, torch.zeros(7))
    with pytest.raises(KernelInputError, match="must be"):
        native.pack(torch.zeros(8, 4, dtype=torch.float16))
    with pytest.raises(KernelInputError, match="must be"):
        native.pack(torch.zeros(0, 4))
    with pytest.raises(KernelInputError, match="another backend"):
        native.linear(torch.zeros(2, 4), ReferenceLeaf().pack(torch.zeros(8, 4)), None)


def test_a_missing_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkeep.ops._native.missing_feature", lambda _: "avx512_bf16")
    with pytest.raises(ConfigError, match="avx512_bf16"):
        ops.select("avx512", 1)


def test_select_names_the_path_and_wants_a_thread() -> None:
    assert ops.select("auto", 1).name == ops.available()[0]
    assert ops.select("reference", 1).name == "reference"
    with pytest.raises(ConfigError, match="threads"):
        ops.select("auto", 0)


def test_native_and_reference_calls_are_counted() -> None:
    chosen = ops.select("auto", 1).leaf
    assert isinstance(chosen, ops.CpuLeaf)
    packed = chosen.pack(torch.zeros(8, 4))
    before = chosen.calls
    chosen.linear(torch.zeros(2, 4), packed, None)
    assert chosen.calls == before + 1
    reference = ReferenceLeaf()
    reference.linear(torch.zeros(2, 4), reference.pack(torch.zeros(8, 4)), None)
    assert reference.calls == 1
