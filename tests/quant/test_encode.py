"""Coding by a CPU's kernels: bit for bit what torch does, on every path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvkeep.errors import KernelInputError, NonFiniteKV
from kvkeep.ops.codes import CODE_BITS
from kvkeep.ops.cpu import CpuKernel, available, cpu_encoder
from kvkeep.ops.cpu_encode import rows_of_tiles
from kvkeep.quant.codec import KVShape, Place, Tiles, pack_float_tiles, values_of, values_plainly
from kvkeep.quant.hack import Hack
from kvkeep.types import PAGE_TOKENS, Layout

CODED = list(CODE_BITS)
HEADS = 3

layouts = pytest.mark.parametrize("layout", CODED, ids=lambda layout: Layout(layout).name)
kernels = pytest.mark.parametrize("kernel", available())
firsts = pytest.mark.parametrize("first", [False, True], ids=["inner", "first"])


class Forced(Hack):
    """Pages coded by one kernel."""

    def __init__(self, layout: Layout, kernel: CpuKernel) -> None:
        super().__init__(layout)
        self._encoder = cpu_encoder(kernel)


def made(dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k, v [HEADS, S, D], in each of which some channels and tokens are uncommon."""
    draw = torch.Generator().manual_seed(dim)
    k, v = (torch.randn((HEADS, PAGE_TOKENS, dim), generator=draw) for _ in range(2))
    k += 3 * torch.randn((HEADS, 1, dim), generator=draw)
    for x in (k, v.transpose(1, 2)):
        x[0, :, 1] = 1.5
        x[0, :, 2] = 0.0
        x[0, ::3, 2] = -0.0
        x[0, :, 3] = -0.0
        x[0, :, 4] *= 1e-39
        x[0, :, 5] *= 1e-42
        x[1, :, 6] = torch.arange(PAGE_TOKENS if x is k else dim) % 7 * 0.5
        x[1, :, 7] = (x[1, :, 7] > 0).float()
        x[1, 9, 8] = 6e4
        x[1, 1, 9] = -6e4
        if dtype != torch.float16:
            x[2, :, 10] *= 1e30
            x[2, :, 11] *= 1e35
            x[2, :, 12] = torch.finfo(torch.float32).max / 2
            x[2, 3, 13] = 1e35
    v[0] = torch.where(v[0].isfinite(), v[0], 0.0)
    return k.to(dtype), v.to(dtype)


def same(codec: Hack, k: torch.Tensor, v: torch.Tensor, *, first: bool = False) -> Tiles:
    """Hold the kernel's tiles against torch's and return them."""
    found = codec.encode(k, v, Place(0, first))
    expected = codec.encode_plainly(k, v, Place(0, first))
    assert found.shape == expected.shape
    assert np.array_equal(found, expected), np.argwhere(found != expected)[:8]
    return found


@kernels
@layouts
@firsts
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_tiles_are_torchs_bit_for_bit(
    kernel: CpuKernel, layout: Layout, first: bool, dim: int
) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        same(Forced(layout, kernel), *made(dim, dtype), first=first)


@kernels
@firsts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_sums_are_added_in_one_order(kernel: CpuKernel, dtype: torch.dtype, first: bool) -> None:
    """So many channels that another order would show in what some of them are rounded to."""
    draw = torch.Generator().manual_seed(2)
    k, v = torch.randn((2, 192, PAGE_TOKENS, 128), generator=draw).to(dtype)
    same(Forced(Layout.K2V2, kernel), k, v, first=first)


@kernels
@layouts
def test_bits_depend_on_no_other_tile(kernel: CpuKernel, layout: Layout) -> None:
    k, v = made(64, torch.bfloat16)
    together = same(Forced(layout, kernel), k, v, first=True)
    alone = [same(Forced(layout, kernel), x[None], y[None], first=True) for x, y in zip(k, v)]
    assert np.array_equal(together, np.concatenate(alone))


@kernels
def test_rows_need_not_lie_side_by_side(kernel: CpuKernel) -> None:
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in made(64, torch.float32))
    assert not k.is_contiguous()
    same(Forced(Layout.K4V2, kernel), k, v)


@kernels
@firsts
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_what_torch_refuses_is_refused(
    kernel: CpuKernel, layout: Layout, first: bool, dtype: torch.dtype
) -> None:
    top = torch.finfo(dtype).max
    bad = [float("nan"), float("inf"), -float("inf"), top, -top]
    quiet = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
    codec, place, refused = Forced(layout, kernel), Place(0, first), 0
    for at, token in [(0, 1), (1, 1), (0, 40), (1, 40), (2, 40)]:
        for value in (*bad, quiet):
            k, v = (torch.where(x.abs() < 1e6, x, 1.0) for x in made(32, torch.float32))
            k, v = k.to(dtype), v.to(dtype)
            for part in (k, v)[at % 2 :][: 1 + at // 2]:
                part[1, token, 20] = part[2, token, 20] = value
            expected = said(codec.encode_plainly, k, v, place)
            assert said(codec.encode, k, v, place) == expected
            refused += expected is not None
    assert refused >= 20, "of 30; numbers at a dtype's end may fit"


def said(
    encode: Callable[[torch.Tensor, torch.Tensor, Place], Tiles],
    k: torch.Tensor,
    v: torch.Tensor,
    place: Place,
) -> tuple[str, int] | None:
    """Return what a call refuses, if anything."""
    try:
        encode(k, v, place)
    except NonFiniteKV as error:
        return error.what, error.head
    return None


def test_shapes_that_no_kernel_takes_are_refused() -> None:
    encoder, page = cpu_encoder(), torch.zeros(2, PAGE_TOKENS, 32)
    for k, v in [(page, page[:1]), (page[:, 1:], page[:, 1:]), (page, page.bfloat16())]:
        with pytest.raises(KernelInputError, match=r"must be \[N, 64, D\] in one dtype"):
            encoder.encode(k, v, Layout.K4V2, first=False, narrowed=0.0)
    with pytest.raises(KernelInputError, match="head_dim 40"):
        same(Hack(Layout.K4V2), *torch.zeros(2, 1, PAGE_TOKENS, 40))
    with pytest.raises(KernelInputError, match="are not BF16 of 64 channels"):
        rows_of_tiles(torch.zeros((1, 64), dtype=torch.uint8), Layout.BF16, 64)


@pytest.mark.parametrize("layout", [Layout.F32, Layout.BF16], ids=lambda layout: layout.name)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
def test_rows_of_tiles_are_torchs(layout: Layout, dim: int) -> None:
    dtype = torch.float32 if layout == Layout.F32 else torch.bfloat16
    k, v = torch.randn((2, HEADS, PAGE_TOKENS, dim)).to(dtype)
    shape = KVShape(1, HEADS, dim, layout)
    tiles = torch.from_numpy(pack_float_tiles(k, v, layout))
    for found, plain, made_of in zip(
        values_of(tiles, shape), values_plainly(tiles, shape), (k, v), strict=True
    ):
        assert torch.equal(found, made_of)
        assert torch.equal(found, plain)
