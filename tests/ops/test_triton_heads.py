"""Triton's observing kernels tell heads apart."""

from __future__ import annotations

import numpy as np
import pytest

from kvkeep.ops.layout import Observe
from kvkeep.types import Layout
from tests.ops.devices import ROW_LAYOUTS, OnDevice, world_of
from tests.oracles import Heads, flat_plan

TINY = Heads(4, 2, 32)


@pytest.fixture(params=ROW_LAYOUTS, ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(request.param)


def test_heads_have_thresholds_of_their_own(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 4)
    request = world.add(ops, 200)
    by_head = np.array([[-8.0, -6.0], [-7.0, -9.0]], np.float32)
    q = world.tensor(2, TINY.q, TINY.dim)
    plan = flat_plan(layout, [(request.slots, [199, 90])])
    got = ops.attend(q, world.kv, plan, Observe(by_head)).hits
    assert got is not None
    for head in range(TINY.kv):
        alone = ops.attend(q, world.kv, plan, Observe(by_head[:, head])).hits
        assert alone is not None
        assert np.array_equal(got[:, head], alone[:, head])
