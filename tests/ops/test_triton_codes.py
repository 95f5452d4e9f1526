"""Triton's kernels on codes: against the reference, to the bit where only integers are summed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvkeep.ops.codes import CODE_BITS
from kvkeep.ops.layout import Attended, AttentionPlan
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import Layout
from tests.coded import CodedWorld, coded_plan, make_coded_world
from tests.ops.coded_devices import plan_on_device, pool_on_device
from tests.ops.devices import OnDevice
from tests.oracles import Heads, tolerance

CODED = list(CODE_BITS)


def near(world: CodedWorld, got: Attended, want: Attended) -> None:
    """Hold a result within the model's tolerance and a few weights that round the other way."""
    exact = want.out.double().numpy()
    allowed = tolerance(world.model, exact) + 2e-3 * np.abs(exact).max()
    error = np.abs(got.out.double().numpy() - exact)
    assert (error <= allowed).all(), f"worst {error.max():.2e}, allowed {allowed.min():.2e}"
    np.testing.assert_allclose(got.lse2.numpy(), want.lse2.numpy(), rtol=1e-6, atol=1e-4)


def attend_and_check(world: CodedWorld, plan: AttentionPlan, ops: OnDevice | None = None) -> None:
    ops = ops or OnDevice()
    q = world.tensor(len(plan.row_positions), world.heads.q, world.heads.dim)
    want = ReferenceAttention().attend(q, world.kv, plan)
    near(world, ops.attend(q, pool_on_device(world), plan_on_device(world, plan)), want)
    assert ops.inner.decode_calls == 0


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_the_reference_agrees(layout: Layout, dim: int, group: int) -> None:
    heads = Heads(2 * group, 2, dim)
    world = make_coded_world(heads, Layout.F32, pages=24, seed=dim)
    parts = [
        (world.add(layout, coded, tail), rows)
        for coded, tail, rows in [(3, 0, [191, 3, 64]), (4, 100, [355]), (2, 70, [197])]
    ]
    attend_and_check(world, coded_plan(world, parts))
