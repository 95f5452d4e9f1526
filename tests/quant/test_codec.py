"""Tiles of every float layout: packed and unpacked, and as that layout's kernels write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvkeep.ops.layout import TORCH_DTYPE, AttentionOps, float_tile_bytes
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.quant.codec import KVShape, pack_float_tiles, unpack_float_tiles
from kvkeep.types import PAGE_TOKENS, Layout
from tests.ops.devices import DEVICE, ROW_LAYOUTS, OnDevice
from tests.oracles import Heads, make_world

DIM = 32


@pytest.mark.parametrize("layout", list(TORCH_DTYPE), ids=lambda layout: layout.name)
def test_what_is_packed_is_unpacked(layout: Layout) -> None:
    shape = (3, PAGE_TOKENS, DIM)
    k, v = (torch.randn(shape).to(TORCH_DTYPE[layout]) for _ in range(2))
    tiles = pack_float_tiles(k, v, layout)
    assert tiles.shape == (3, float_tile_bytes(layout, DIM))
    keys, values = unpack_float_tiles(tiles, KVShape(1, 3, DIM, layout))
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


@pytest.mark.parametrize(
    "layout", [Layout.F32, Layout.BF16, *ROW_LAYOUTS], ids=lambda layout: layout.name
)
def test_a_tile_is_what_the_kernels_append(layout: Layout) -> None:
    rows = layout in ROW_LAYOUTS
    ops: AttentionOps = OnDevice() if rows else ReferenceAttention()
    world = make_world(Heads(2, 1, DIM), layout, pages=1, device=DEVICE if rows else "cpu")
    request = world.add(ops, PAGE_TOKENS)
    tile = int(world.kv.tile_table[request.slots[0], 1, 0])
    size = world.kv.unit_bytes
    written = world.kv.buffer[tile * size : (tile + 1) * size].cpu().numpy()
    k, v = (x.permute(1, 0, 2) for x in (request.k, request.v))
    assert np.array_equal(pack_float_tiles(k, v, layout)[0], written)
