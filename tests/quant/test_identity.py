"""Attention on codes equals the product of what the codes stand for, in float64, on either axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvkeep.ops.codes import CODE_BITS, SINK_TOKENS, partition_channels, sink_bytes
from kvkeep.quant.baselines.paper import HackPaper, Summed
from kvkeep.quant.codec import Place
from kvkeep.quant.hack import Hack, dequantise
from kvkeep.types import PAGE_TOKENS, Layout

Array = NDArray[np.float64]
ROWS = 5


def made(dim: int, tail: int) -> tuple[torch.Tensor, torch.Tensor, Array, Array]:
    """k, v of two heads, rows of a query and of weights; the page's last `tail` tokens weigh 0."""
    draw = torch.Generator().manual_seed(dim + tail)
    k = torch.randn((2, PAGE_TOKENS, dim), generator=draw) + 4
    v = torch.randn((2, PAGE_TOKENS, dim), generator=draw)
    q = torch.randn((2, ROWS, dim), generator=draw).double().numpy()
    p = torch.rand((2, ROWS, PAGE_TOKENS), generator=draw).double().numpy()
    p[..., PAGE_TOKENS - tail :] = 0
    return k, v, q, p


def close(found: Array, exact: Array) -> None:
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()


def wide(x: torch.Tensor) -> Array:
    return np.asarray(x.double().numpy())


@pytest.mark.parametrize("layout", list(CODE_BITS), ids=lambda layout: layout.name)
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
@pytest.mark.parametrize("tail", [0, 1, 63])
def test_scales_off_the_sum_fold_into_query_and_weights(
    layout: Layout, dim: int, tail: int
) -> None:
    k, v, q, p = made(dim, tail)
    codes, part = Hack(layout).codes(k, v, first=False), partition_channels(dim)
    keys, values = (wide(x) for x in dequantise(codes))
    k_scale, k_min = wide(codes.k_scale)[:, None], wide(codes.k_min)
    v_scale, v_min = wide(codes.v_scale), wide(codes.v_min)
    k_codes, v_codes = codes.k.numpy().astype(np.int64), codes.v.numpy().astype(np.int64)

    scores = np.einsum("hrd,hd->hr", q, k_min)[..., None] + np.zeros(PAGE_TOKENS)
    folded_back = np.zeros_like(q)
    for begin in range(0, dim, part):
        span = slice(begin, begin + part)
        folded = q[..., span] * k_scale[..., span]
        step = np.abs(folded).max(-1, keepdims=True) / 127
        small = np.rint(folded / step).astype(np.int64)
        scores += step * np.einsum("hrd,htd->hrt", small, k_codes[..., span])
        folded_back[..., span] = step * small / k_scale[..., span]
    least = np.einsum("hrd,hd->hr", q - folded_back, k_min)[..., None]
    close(scores, np.einsum("hrd,htd->hrt", folded_back, keys) + least)

    for h, begin in enumerate(range(0, dim, part)):
        span = slice(begin, begin + part)
        folded = p * v_scale[:, None, h]
        step = folded.max(-1, keepdims=True) / 255
        small = np.rint(folded / step).astype(np.int64)
        out = step * np.einsum("hrt,htd->hrd", small, v_codes[..., span])
        out += np.einsum("hrt,ht->hr", p, v_min[:, h])[..., None]
        stood_for = step * small / v_scale[:, None, h]
        exact = np.einsum("hrt,htd->hrd", stood_for, values[..., span])
        close(out, exact + np.einsum("hrt,ht->hr", p - stood_for, v_min[:, h])[..., None])


def product(a: Array, b: Summed) -> tuple[Array, Array]:
    """a [h, r, n] times b's partitions [h, c, n]: on codes with stored sums, and dequantised."""
    least = a.min(-1, keepdims=True)
    step = (a.max(-1, keepdims=True) - least) / 255
    small = np.rint((a - least) / step).astype(np.int64)
    scale, floor, sums = (wide(x)[:, None, :, 0] for x in (b.scale, b.least, b.sums))
    integer = np.einsum("hrn,hcn->hrc", small, b.codes.numpy().astype(np.int64))
    found = step * scale * integer + floor * step * small.sum(-1, keepdims=True)
    found += least * scale * sums + a.shape[-1] * least * floor
    return found, np.einsum("hrn,hcn->hrc", step * small + least, wide(b.values()))


@pytest.mark.parametrize("dim", [16, 64, 96, 128])
@pytest.mark.parametrize("tail", [0, 1, 63])
@pytest.mark.parametrize("stochastic", [False, True])
def test_scales_along_the_sum_need_the_sums_of_codes(dim: int, tail: int, stochastic: bool) -> None:
    k, v, q, p = made(dim, tail)
    keys, values = HackPaper(stochastic=stochastic).operands(k, v)
    part = partition_channels(dim)
    for i, begin in enumerate(range(0, dim, part)):
        one = Summed(*(x[:, :, i] for x in keys))
        close(*product(q[..., begin : begin + part], one))
    close(*product(p, values))


def mib(bytes_per_page: int, pages: int, rest: int) -> float:
    """MiB of Qwen3-8B's 36 layers and 8 KV heads of 128: pages, then bytes of tokens in 16 bits."""
    return 36 * 8 * (bytes_per_page * pages + rest) / 2**20


def test_4096_tokens_take_the_bytes_of_the_closed_form() -> None:
    dim, tokens = 128, 4096
    k, v, _, _ = made(dim, 0)
    with_sums = len(HackPaper().encode(k, v, Place(0, False))) // 2
    assert with_sums == 84 * PAGE_TOKENS
    closed = (tokens - SINK_TOKENS) // PAGE_TOKENS
    rest = 4 * dim * (tokens - closed * PAGE_TOKENS)
    assert mib(with_sums, closed, rest) == pytest.approx(102.0, abs=0.05)
    ours = Hack(Layout.K2V2).encode(k, v, Place(0, False)).shape[1]
    assert ours == 80 * PAGE_TOKENS
    assert mib(ours, tokens // PAGE_TOKENS, sink_bytes(dim)) == pytest.approx(90.6, abs=0.05)
