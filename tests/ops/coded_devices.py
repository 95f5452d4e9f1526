"""Coded pools for a device's kernels: those of `tests/coded.py`, their float tiles as plain rows.

A plan is checked for all layers at once, so all of them have the tiles of the one attended.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kvkeep.ops.layout import AttentionPlan, LayerKV
from kvkeep.types import PAGE_TOKENS, Layout
from tests.coded import LAYER, UNIT, CodedWorld
from tests.ops.devices import DEVICE

ROWS = {Layout.F32: Layout.ROWS_F32, Layout.BF16: Layout.ROWS_BF16}


def pool_on_device(world: CodedWorld) -> LayerKV:
    """Return a copy of a world's pool on the device: unwritten rows stay as they were."""
    kv = world.kv
    buffer = kv.buffer.clone()
    for context in world.contexts:
        own = context.slots[len(context.coded) :]
        for at, slot in enumerate(own.tolist()):
            rows = slice(at * PAGE_TOKENS, (at + 1) * PAGE_TOKENS)
            for head in range(kv.num_kv_heads):
                begin = int(kv.tile_table[slot, LAYER, head]) * UNIT
                for x in (context.k, context.v):
                    written = x[rows, head].contiguous().view(torch.uint8).ravel()
                    buffer[begin : begin + len(written)] = written
                    begin += PAGE_TOKENS * kv.head_dim * x.element_size()
    table = np.repeat(kv.tile_table[:, LAYER : LAYER + 1], kv.tile_table.shape[1], axis=1)
    return replace(kv, buffer=buffer.to(DEVICE), tile_table=table)


def plan_on_device(world: CodedWorld, plan: AttentionPlan) -> AttentionPlan:
    """Return a plan of the device's layouts."""
    runs = plan.runs.copy()
    runs[runs[:, 3] == int(world.model), 3] = int(ROWS[world.model])
    return replace(plan, runs=runs)
