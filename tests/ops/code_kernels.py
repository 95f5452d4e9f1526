"""The parts of Triton's kernels on codes, one at a time: what they make of bytes given to them."""

import torch
import triton
import triton.language as tl

from kvkeep.ops.codes import CODE_BITS, partition_channels
from kvkeep.ops.triton_codes import (
    key_codes,
    multiply_keys,
    multiply_values,
    nearest,
    spread,
    value_codes,
)
from kvkeep.types import PAGE_TOKENS, Layout
from tests.ops.devices import DEVICE


@triton.jit
def _sums_kernel(
    tile, queries, weights, key_sums, value_sums, h,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr,
):  # fmt: skip
    """Multiply bytes [R, KP] with keys and [R, S] with values of partition h."""
    r = tl.arange(0, R)
    d = spread(BLOCK, 8 // K_BITS)
    t = spread(S, 8 // V_BITS)
    signed = tl.load(queries + r[:, None] * KP + d[None, :], mask=(d < KP)[None, :], other=0)
    sums = multiply_keys(signed, key_codes(tile, h, t, True, D, KP, BLOCK, K_BITS), K_BITS)
    tl.store(key_sums + r[:, None] * S + t[None, :], sums)
    shifted = (tl.load(weights + r[:, None] * S + t[None, :]).to(tl.int16) - 128).to(tl.int8)
    values = tile + S * D * K_BITS // 8 + 4 * D
    sums = multiply_values(
        shifted, value_codes(values, h, True, S, D, KP, BLOCK, V_BITS), S, V_BITS
    )
    d = tl.arange(0, BLOCK)
    tl.store(value_sums + r[:, None] * KP + d[None, :], sums, mask=(d < KP)[None, :])


@triton.jit
def _nearest_kernel(x, integers, scales, R: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr):
    at = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    found, scale = nearest(tl.load(x + at), TOP)
    tl.store(integers + at, found)
    tl.store(scales + tl.arange(0, R), scale)


def integer_sums(
    tile: torch.Tensor, layout: Layout, dim: int, h: int, signed: torch.Tensor, top: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 sums of partition h.

    They are [R, S] of int8 `signed` [R, KP] with the keys and [R, KP] of uint8 `top` [R, S] with
    the values; tokens and channels stand in their own order.
    """
    bits, channels = CODE_BITS[layout], partition_channels(dim)
    rows = len(signed)
    keys = torch.empty((rows, PAGE_TOKENS), dtype=torch.int32, device=DEVICE)
    values = torch.empty((rows, channels), dtype=torch.int32, device=DEVICE)
    _sums_kernel[1,](
        tile.to(DEVICE), signed.to(DEVICE), top.to(DEVICE), keys, values, h,
        rows, PAGE_TOKENS, dim, channels, max(32, 1 << (channels - 1).bit_length()), *bits,
    )  # fmt: skip
    return keys.cpu(), values.cpu()


def nearest_of(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [R, N] float32 as integers up to `top`, and the scale of each row."""
    there = x.to(DEVICE)
    integers, scales = torch.empty_like(there), torch.empty(len(x), device=DEVICE)
    _nearest_kernel[1,](there, integers, scales, *x.shape, float(top), enable_fp_fusion=False)
    return integers.cpu(), scales.cpu()
