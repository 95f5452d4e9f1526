"""What Triton's kernels refuse before anything runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import Observe, float_tile_bytes
from kvkeep.types import PAGE_TOKENS, Layout
from tests.ops.devices import ROW_LAYOUTS, OnDevice, world_of
from tests.oracles import Heads, World, flat_plan

TINY = Heads(4, 2, 32)


@pytest.fixture(params=ROW_LAYOUTS, ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(request.param)


def good(layout: Layout) -> tuple[World, torch.Tensor, list[int], OnDevice]:
    ops = OnDevice()
    world = world_of(TINY, layout, 4)
    world.add(ops, 100)
    return world, world.tensor(1, TINY.q, TINY.dim), [99], ops


def test_what_does_not_fit_is_refused_before_a_kernel_runs(layout: Layout) -> None:
    world, q, positions, ops = good(layout)
    plan = flat_plan(layout, [(world.requests[0].slots, positions)])
    other = flat_plan(Layout.F32, [(world.requests[0].slots, positions)])
    shuffled = dataclasses.replace(plan, row_order=np.array([4], np.int32))
    wide = torch.zeros(1, 130, 32, dtype=q.dtype)
    wide_kv = world_of(Heads(130, 1, 32), layout, 1).kv
    small = dataclasses.replace(world.kv, unit_bytes=float_tile_bytes(layout, 48))
    cases = [
        (q, world.kv, other, "layout"),
        (q, world.kv, shuffled, "every row once"),
        (q[:, :3], world.kv, plan, "heads"),
        (q.double(), world.kv, plan, "float64"),
        (q, dataclasses.replace(world.kv, layer=2), plan, "layer"),
        (q, small, plan, "hold"),
        (wide, wide_kv, flat_plan(layout, [(np.zeros(0, np.int32), [0])]), "at most 128"),
        (q, dataclasses.replace(world.kv, head_dim=8), plan, "multiple of 16"),
    ]
    calls = ops.inner.calls
    for queries, kv, wrong, message in cases:
        with pytest.raises(KernelInputError, match=message):
            ops.attend(queries, kv, wrong)
    with pytest.raises(KernelInputError, match="q is on meta"):
        ops.inner.attend(torch.empty_like(q, device="meta"), world.kv, plan)
    with pytest.raises(KernelInputError, match="thresholds"):
        ops.attend(q, world.kv, plan, Observe(np.zeros(3, np.float32)))
    with pytest.raises(KernelInputError, match="do not fit"):
        ops.merge(torch.zeros(2, 3, 4, 32), torch.zeros(2, 3))
    assert ops.inner.calls == calls + 1


def test_tiles_outside_the_pool_are_refused(layout: Layout) -> None:
    world, q, positions, ops = good(layout)
    plan = flat_plan(layout, [(world.requests[0].slots, positions)])
    table = world.kv.tile_table.copy()
    table[plan.pages[0], 1, 0] = 10**6
    kv = dataclasses.replace(world.kv, tile_table=table)
    with pytest.raises(KernelInputError, match="without a tile"):
        ops.attend(q, kv, plan)
    row = world.tensor(1, TINY.kv, TINY.dim)
    with pytest.raises(KernelInputError, match="without a tile"):
        ops.append(kv, row, row, np.array([plan.pages[0] * PAGE_TOKENS], np.int32))
    with pytest.raises(KernelInputError, match="outside the tile table"):
        ops.append(world.kv, row, row, np.array([9 * PAGE_TOKENS], np.int32))
    with pytest.raises(KernelInputError, match=r"k .* and v"):
        ops.append(world.kv, row, row[:, :1], np.zeros(1, np.int32))
