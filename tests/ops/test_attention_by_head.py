"""Runs whose codes differ by KV head: each head as in a run of its own layout, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import AttentionPlan, LayerKV
from kvkeep.types import Int32Array, Layout
from tests.coded import LAYER, CodedWorld, coded_plan, make_coded_world
from tests.ops.paths import PATHS, Path, cpu_attention, ops_for
from tests.oracles import Heads

HEADS = Heads(6, 2, 64)
LAYOUTS = (Layout.K2V2, Layout.K4V2)
ROWS = [1500, 1279, 700, 64, 3]


def mixed(world: CodedWorld, coded: Int32Array | None) -> tuple[LayerKV, list[AttentionPlan]]:
    """Return a layer whose heads are in either layout, and three plans: by head, of one, of both.

    The pages of the first plan have the tiles of the second for head 0, those of the third for 1.
    """
    contexts = [world.add(layout, 18, 400) for layout in LAYOUTS]
    plans = [coded_plan(world, [(context, ROWS)]) for context in contexts]
    pages = np.arange(len(plans[0].pages), dtype=np.int32) + sum(len(p.pages) for p in plans)
    for head, context in enumerate(contexts):
        world.kv.tile_table[pages, LAYER, head] = world.kv.tile_table[context.slots, LAYER, head]
    runs = plans[0].runs.copy()
    runs[0, 3] = Layout.BY_HEAD
    by_head = replace(plans[0], pages=pages, runs=runs)
    return replace(world.kv, coded=coded), [by_head, *plans]


@pytest.mark.parametrize("path", PATHS)
def test_each_head_is_attended_in_its_own_layout(path: Path) -> None:
    world = make_coded_world(HEADS, Layout.BF16, pages=80)
    kv, (by_head, *plans) = mixed(world, np.array(LAYOUTS, np.int32))
    q = world.tensor(len(ROWS), HEADS.q, HEADS.dim)
    ops = ops_for(path, 2)
    got, before = ops.attend(q, kv, by_head), ops.bytes_read
    want = [ops.attend(q, world.kv, plan) for plan in plans]
    group = HEADS.q // HEADS.kv
    for head, one in enumerate(want):
        own = slice(head * group, (head + 1) * group)
        assert torch.equal(got.out[:, own], one.out[:, own])
        assert torch.equal(got.lse2[:, own], one.lse2[:, own])
    assert ops.bytes_read - before == 2 * before, "half of each of the two"


@pytest.mark.parametrize(
    ("coded", "said"),
    [
        (None, "neither coded nor"),
        (np.array([Layout.K2V2], np.int32), "int32"),
        (np.array(LAYOUTS, np.int64), "int32"),
        (np.array([Layout.K2V2, Layout.BF16], np.int32), "not coded"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_heads_without_a_coded_layout_are_refused(
    path: Path, coded: Int32Array | None, said: str
) -> None:
    world = make_coded_world(HEADS, Layout.BF16, pages=80)
    kv, (by_head, *_) = mixed(world, coded)
    q = world.tensor(len(ROWS), HEADS.q, HEADS.dim)
    with pytest.raises(KernelInputError, match=said):
        ops_for(path).attend(q, kv, by_head)


def test_a_later_layer_without_layouts_is_refused() -> None:
    """A plan is checked in its first layer; what another layer lacks is found all the same."""
    world = make_coded_world(HEADS, Layout.BF16, pages=80)
    kv, (by_head, *_) = mixed(world, np.array(LAYOUTS, np.int32))
    q = world.tensor(len(ROWS), HEADS.q, HEADS.dim)
    ops = cpu_attention("portable")
    ops.attend(q, kv, by_head)
    with pytest.raises(KernelInputError, match="the layer names none"):
        ops.attend(q, replace(kv, layer=0, coded=None), by_head)
