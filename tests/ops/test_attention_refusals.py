"""What attention refuses before a kernel runs, on every path this machine has."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.ops.layout import AttentionPlan, LayerKV, Observe
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import PAGE_TOKENS, Layout
from tests.ops.paths import Path, cpu_attention, ops_for
from tests.oracles import Heads, World, flat_plan, make_world

SMALL = Heads(4, 2, 64)


def good(layout: Layout = Layout.F32) -> tuple[World, torch.Tensor, AttentionPlan]:
    world = make_world(SMALL, layout, pages=4)
    request = world.add(ReferenceAttention(), 100)
    plan = flat_plan(layout, [(request.slots, [99])])
    return world, world.tensor(1, SMALL.q, SMALL.dim), plan


def with_run(plan: AttentionPlan, **columns: int) -> AttentionPlan:
    runs = plan.runs.copy()
    names = ["page_begin", "page_count", "first_position", "layout"]
    for name, value in columns.items():
        runs[0, names.index(name)] = value
    return dataclasses.replace(plan, runs=runs)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layout": 9}, "layout"),
        ({"layout": int(Layout.K4V4)}, r"layout|hold"),
        ({"layout": int(Layout.BF16)}, "layout"),
        ({"page_count": 9}, "outside the plan's pages"),
        ({"first_position": 5}, "inside a page"),
    ],
)
def test_bad_runs_are_refused(path: Path, columns: dict[str, int], message: str) -> None:
    world, q, plan = good()
    with pytest.raises(KernelInputError, match=message):
        ops_for(path).attend(q, world.kv, with_run(plan, **columns))


def test_a_private_tile_cannot_begin_a_coded_sequence(path: Path) -> None:
    world, q, plan = good()
    coded = with_run(plan, layout=int(Layout.K2V2))
    tiles = np.zeros((1, world.kv.tile_table.shape[1], SMALL.kv), np.int32)
    pages = np.array([-1, *plan.pages[1:]], np.int32)
    with pytest.raises(KernelInputError, match="no sinks"):
        ops_for(path).attend(
            q, world.kv, dataclasses.replace(coded, pages=pages, private_tiles=tiles)
        )


def test_bad_shapes_are_refused(path: Path) -> None:
    world, q, plan = good()
    ops = ops_for(path)
    with pytest.raises(KernelInputError, match="float16"):
        ops.attend(q.half(), world.kv, plan)
    with pytest.raises(KernelInputError, match="rows"):
        ops.attend(q.repeat(2, 1, 1), world.kv, plan)
    with pytest.raises(KernelInputError, match="heads"):
        ops.attend(q[:, :3], world.kv, plan)
    outside = dataclasses.replace(plan, pages=plan.pages + 4)
    with pytest.raises(KernelInputError, match="tile table"):
        ops.attend(q, world.kv, outside)
    with pytest.raises(KernelInputError, match=r"layout|hold"):
        ops.attend(q.bfloat16(), world.kv, plan)


def test_a_page_without_a_tile_is_refused(path: Path) -> None:
    world, q, plan = good()
    table = world.kv.tile_table.copy()
    table[plan.pages[0], 1, 0] = 10**6
    kv = dataclasses.replace(world.kv, tile_table=table)
    ops = ops_for(path)
    with pytest.raises(KernelInputError, match="without a tile"):
        ops.attend(q, kv, plan)
    slots = np.array([plan.pages[0] * PAGE_TOKENS], np.int32)
    row = world.tensor(1, SMALL.kv, SMALL.dim)
    with pytest.raises(KernelInputError, match="without a tile"):
        ops.append(kv, row, row, slots)


@pytest.mark.parametrize("name", available())
def test_native_refusals(name: CpuKernel) -> None:
    ops = cpu_attention(name)
    world, q, plan = good()
    with pytest.raises(KernelInputError, match="step of 128"):
        ops.attend(q, world.kv, with_run(plan, first_position=64))
    with pytest.raises(KernelInputError, match="every row once"):
        ops.attend(
            q.repeat(2, 1, 1),
            world.kv,
            dataclasses.replace(plan, row_positions=np.array([9, 9], np.int32)),
        )
    twice = dataclasses.replace(
        plan, runs=np.repeat(plan.runs, 2, axis=0), groups=np.array([[0, 1, 0, 2]], np.int32)
    )
    with pytest.raises(KernelInputError, match="order of position"):
        ops.attend(q, world.kv, twice)
    odd = LayerKV(world.kv.buffer, world.kv.tile_table, 2 * 64 * 40 * 4, 1, 2, 40)
    with pytest.raises(KernelInputError, match="multiple of 16"):
        ops.attend(torch.zeros(1, 4, 40), odd, plan)
    with pytest.raises(KernelInputError, match="thresholds"):
        ops.attend(q, world.kv, plan, Observe(np.zeros(3, np.float32)))
    with pytest.raises(KernelInputError, match=r"k .* and v"):
        ops.append(world.kv, q, q, np.zeros(1, np.int32))
    with pytest.raises(KernelInputError, match="outside the tile table"):
        ops.append(world.kv, q[:, :2], q[:, :2], np.array([9 * PAGE_TOKENS], np.int32))
    with pytest.raises(KernelInputError, match="layer"):
        ops.attend(q, dataclasses.replace(world.kv, layer=2), plan)
    with pytest.raises(KernelInputError, match="do not fit"):
        ops.merge(torch.zeros(2, 3, 4, 64), torch.zeros(2, 3))
