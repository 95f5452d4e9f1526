"""Tokens of several tiles in new ones: values bit by bit, keys as near as their codes allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvkeep.ops.codes import CODE_BITS, unpack_codes
from kvkeep.quant.codec import KVShape, Place, pack_float_tiles, unpack_float_tiles
from kvkeep.quant.hack import Hack, dequantise
from kvkeep.quant.regroup import regroup
from kvkeep.types import PAGE_TOKENS, Layout

DIM = 64
CODED = sorted(CODE_BITS)
FLOAT = (Layout.F32, Layout.BF16, Layout.ROWS_BF16)


def made(tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn((2, tiles, PAGE_TOKENS, DIM), generator=torch.Generator().manual_seed(2))
    k, v = drawn + torch.arange(tiles)[:, None, None] % 2
    return k.contiguous(), v.contiguous()


def chosen(tiles: int, count: int) -> np.ndarray:
    drawn = np.random.default_rng(3).choice(tiles * PAGE_TOKENS, (count, PAGE_TOKENS))
    return np.sort(drawn, axis=None).reshape(count, PAGE_TOKENS)


@pytest.mark.parametrize("layout", FLOAT, ids=lambda one: one.name)
def test_what_is_in_the_models_dtype_moves_bit_by_bit(layout: Layout) -> None:
    k, v = made(6)
    if layout != Layout.F32:
        k, v = k.bfloat16(), v.bfloat16()
    shape, rows = KVShape(1, 1, DIM, layout), chosen(6, 2)
    back = unpack_float_tiles(regroup(pack_float_tiles(k, v, layout), rows, layout, shape), shape)
    for whole, moved in zip((k, v), back, strict=True):
        assert torch.equal(moved, whole.reshape(-1, DIM)[torch.from_numpy(rows)])


@pytest.mark.parametrize("layout", CODED, ids=lambda one: Layout(one).name)
def test_values_codes_move_bit_by_bit_and_keys_to_the_nearest(layout: Layout) -> None:
    shape, rows = KVShape(1, 1, DIM, Layout.F32), chosen(6, 2)
    k, v = made(6)
    tiles = Hack(layout).encode(k, v, Place(0, first=False))
    before = unpack_codes(torch.from_numpy(tiles), layout, DIM)
    after = unpack_codes(torch.from_numpy(regroup(tiles, rows, layout, shape)), layout, DIM)
    old_k, old_v = (x.reshape(-1, DIM)[torch.from_numpy(rows)] for x in dequantise(before))
    new_k, new_v = dequantise(after)
    assert torch.equal(new_v, old_v)
    ends = (1 << CODE_BITS[layout].k) - 1
    inside = (after.k > 0) & (after.k < ends)
    step = after.k_scale.float()[:, None].expand_as(new_k)
    assert ((new_k - old_k).abs()[inside] <= 0.51 * step[inside]).all()
    assert inside.float().mean() > 0.4
    assert (new_k - old_k).square().mean() < 2 * step.square().mean() / 12


@pytest.mark.parametrize("layout", CODED, ids=lambda one: Layout(one).name)
def test_a_tile_of_its_own_tokens_stays_as_it_was(layout: Layout) -> None:
    k, v = made(2)
    tiles = Hack(layout).encode(k, v, Place(0, first=False))
    rows = np.arange(2 * PAGE_TOKENS).reshape(2, PAGE_TOKENS)
    same = regroup(tiles, rows, layout, KVShape(1, 1, DIM, Layout.F32))
    before, after = (unpack_codes(torch.from_numpy(x), layout, DIM) for x in (tiles, same))
    assert torch.equal(after.v, before.v)
    if layout == Layout.K2V2:
        assert torch.equal(after.k, before.k)
