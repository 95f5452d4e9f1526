"""Turning heads: native against products of matrices, a row alone against a row among others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvkeep import ops
from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import HOST
from kvkeep.ops.turns import (
    Butterflies,
    HeadTurns,
    Matrices,
    Orders,
    TorchTurn,
    TurnOps,
    hadamard_sums,
)

kernels = pytest.mark.parametrize("kernel", ["avx512", "avx2", "portable"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("bf16", "f32"))
RELATIVE = {torch.bfloat16: 2.0**-7, torch.float32: 4e-6}


def turn(kernel: ops.Kernel, threads: int = 2) -> TurnOps:
    if kernel != "reference" and kernel not in ops.available():
        pytest.skip(f"this CPU does not run {kernel}")
    return ops.select(kernel, threads).turn


def orders(heads: int, dim: int) -> Orders:
    rng = np.random.default_rng(dim)
    found = np.stack([rng.permutation(dim) for _ in range(heads)])
    return Orders(torch.from_numpy(found.astype(np.int32)))


def butterflies(heads: int, dim: int) -> Butterflies:
    rng = np.random.default_rng(dim)
    order = [[rng.permutation(dim) for _ in range(3)] for _ in range(heads)]
    factor = rng.choice([-1.0, 1.0], (heads, 3, dim)) * np.array([1, dim**-0.5, dim**-0.5])[:, None]
    return Butterflies(torch.tensor(np.array(order), dtype=torch.int32), torch.tensor(factor))


def matrices(heads: int, dim: int) -> Matrices:
    rng = np.random.default_rng(dim)
    found = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(heads)]
    return Matrices(torch.tensor(np.array(found), dtype=torch.float32))


made = pytest.mark.parametrize(
    ("make", "dim"),
    [
        (orders, 16), (orders, 80), (orders, 128),
        (butterflies, 16), (butterflies, 64), (butterflies, 128), (butterflies, 256),
        (matrices, 80), (matrices, 96),
    ],
)  # fmt: skip
Make = Callable[[int, int], HeadTurns]


@kernels
@dtypes
@made
def test_native_matches_the_product_with_matrices(
    kernel: ops.Kernel, dtype: torch.dtype, make: Make, dim: int
) -> None:
    native, turns = turn(kernel), make(3, dim)
    for rows, heads in ((0, 3), (1, 3), (2, 12), (40, 6)):
        x = torch.randn(rows, heads, dim, generator=torch.Generator().manual_seed(rows)).to(dtype)
        got = native.turn_heads(x, native.prepare(turns))
        wide = x.double().view(rows, 3, heads // 3, dim)
        want = torch.einsum("thgd,hde->thge", wide, turns.matrices()).reshape(x.shape)
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, rtol=RELATIVE[dtype], atol=RELATIVE[dtype])


@made
def test_what_is_turned_back_is_as_before(make: Make, dim: int) -> None:
    turns = make(2, dim)
    eye = torch.eye(dim, dtype=torch.float64).expand(2, dim, dim)
    there, back = turns.matrices(), turns.inverse().matrices()
    torch.testing.assert_close(there @ back, eye, atol=1e-6, rtol=0)
    torch.testing.assert_close(there.transpose(1, 2), back, atol=1e-6, rtol=0)


@kernels
@dtypes
@made
def test_a_rows_bits_depend_on_it_alone_for_any_stride(
    kernel: ops.Kernel, dtype: torch.dtype, make: Make, dim: int
) -> None:
    native = turn(kernel)
    turns = native.prepare(make(2, dim))
    joined = torch.randn(33, 10 * dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = joined.view(33, 10, dim)[:, 1:9]
    together = native.turn_heads(x, turns)
    alone = torch.cat([native.turn_heads(x[i : i + 1].clone(), turns) for i in range(33)])
    assert torch.equal(together, alone)


@kernels
@made
def test_every_instruction_set_gives_the_same_bits(
    kernel: ops.Kernel, make: Make, dim: int
) -> None:
    native, portable = turn(kernel), turn("portable")
    x = torch.randn(5, 4, dim, generator=torch.Generator().manual_seed(2))
    got, want = (one.turn_heads(x, one.prepare(make(4, dim))) for one in (native, portable))
    assert torch.equal(got, want)


def test_permutations_move_values_that_are_no_numbers() -> None:
    native = turn("portable")
    x = torch.full((1, 1, 16), float("inf"))
    x[0, 0, 3] = float("nan")
    got = native.turn_heads(x, native.prepare(orders(1, 16)))
    assert int(got.isnan().sum()) == 1
    assert int(got.isinf().sum()) == 15


@pytest.mark.parametrize("name", ["native", "torch"])
def test_what_does_not_fit_is_refused(name: str) -> None:
    both: dict[str, TurnOps] = {"native": turn("portable"), "torch": TorchTurn(HOST)}
    one = both.pop(name)
    turns = one.prepare(orders(2, 16))
    for shape in ((3, 3, 16), (3, 2, 32), (3, 16)):
        with pytest.raises(KernelInputError, match="must be"):
            one.turn_heads(torch.zeros(shape), turns)
    (other,) = both.values()
    with pytest.raises(KernelInputError, match="another backend"):
        one.turn_heads(torch.zeros(3, 2, 16), other.prepare(orders(2, 16)))


def test_turns_that_are_none_are_refused() -> None:
    native = turn("portable")
    outside = Orders(torch.full((1, 16), 16, dtype=torch.int32))
    lopsided = Butterflies(torch.zeros(1, 3, 48, dtype=torch.int32), torch.ones(1, 3, 48))
    oblong = Matrices(torch.zeros(1, 16, 32))
    for bad in (outside, lopsided, oblong, orders(1, 24)):
        with pytest.raises(KernelInputError):
            native.prepare(bad)
    with pytest.raises(KernelInputError, match="float32 and bfloat16"):
        native.turn_heads(torch.zeros(1, 1, 16).half(), native.prepare(orders(1, 16)))
    with pytest.raises(KernelInputError, match="power of two"):
        hadamard_sums(48)
