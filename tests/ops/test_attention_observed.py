"""Who is looked at: hits and stamps against the float64 oracle and against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.ops.layout import Observe
from kvkeep.types import PAGE_TOKENS, Layout
from tests.ops.paths import Path, cpu_attention, ops_for
from tests.oracles import Heads, attention_oracle, causal, flat_plan, make_world

SMALL = Heads(4, 2, 64)


@pytest.mark.parametrize("threads", [1, 2])
def test_hits(path: Path, layout: Layout, threads: int) -> None:
    ops = ops_for(path, threads)
    world = make_world(SMALL, layout, pages=30)
    request = world.add(ops, 1500)
    positions = [1499, 700, 64, 1200]
    thresholds = np.array([-9.0, -8.0, np.inf, -12.0], np.float32)
    q = world.tensor(4, SMALL.q, SMALL.dim)
    plan = flat_plan(layout, [(request.slots, positions)])
    got = ops.attend(q, world.kv, plan, Observe(thresholds))
    assert got.hits is not None
    exact = attention_oracle(q, request.k, request.v, causal(SMALL, positions, 1500))
    margin = exact.weights2 - thresholds[:, None, None]
    grouped = margin.reshape(4, SMALL.kv, 2, 1500).max(axis=(0, 2))
    bits = (got.hits[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    hit = bits.astype(bool).transpose(1, 0, 2).reshape(SMALL.kv, -1)
    assert not hit[:, 1500:].any()
    sure = np.abs(grouped) > 1e-3
    assert np.array_equal(hit[:, :1500][sure], (grouped >= 0)[sure])
    assert hit.any()
    assert not hit.all()


def test_heads_have_thresholds_of_their_own(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=30)
    request = world.add(ops, 700)
    positions = [699, 400, 64]
    by_head = np.linspace(-11, -7, 3 * SMALL.kv).reshape(3, SMALL.kv).astype(np.float32)
    q = world.tensor(3, SMALL.q, SMALL.dim)
    plan = flat_plan(layout, [(request.slots, positions)])
    got = ops.attend(q, world.kv, plan, Observe(by_head)).hits
    assert got is not None
    for head in range(SMALL.kv):
        alone = ops.attend(q, world.kv, plan, Observe(by_head[:, head])).hits
        assert alone is not None
        assert np.array_equal(got[:, head], alone[:, head])
    uniform = ops.attend(q, world.kv, plan, Observe(by_head[:, :1])).hits
    assert uniform is not None
    assert not np.array_equal(got, uniform)


@pytest.mark.parametrize("threads", [1, 2])
def test_stamps_tell_the_last_row_that_looked(path: Path, layout: Layout, threads: int) -> None:
    ops = ops_for(path, threads)
    world = make_world(SMALL, layout, pages=60)
    sizes, firsts = [1500, 640], [1500 - 150, 590]
    requests = [world.add(ops, size) for size in sizes]
    asked = [
        (request.slots, list(range(first, size)))
        for request, size, first in zip(requests, sizes, firsts, strict=True)
    ]
    plan = flat_plan(layout, asked)
    rows = len(plan.row_positions)
    thresholds = np.full(rows, -9.0, np.float32)
    thresholds[::3] = np.inf
    q = world.tensor(rows, SMALL.q, SMALL.dim)
    got = ops.attend(q, world.kv, plan, Observe(thresholds, stamps=True))
    assert got.stamps is not None
    assert got.hits is not None
    marked = (got.stamps >= 0).astype(np.uint64) << np.arange(64, dtype=np.uint64)
    assert np.array_equal(marked.sum(2, dtype=np.uint64), got.hits)
    row, entry = 0, 0
    for request, size, first in zip(requests, sizes, firsts, strict=True):
        at = list(range(first, size))
        own = slice(row, row + len(at))
        exact = attention_oracle(q[own], request.k, request.v, causal(SMALL, at, size))
        margin = exact.weights2 - thresholds[own, None, None]
        grouped = margin.reshape(len(at), SMALL.kv, 2, size).max(axis=2)
        want = np.where(grouped >= 0, np.array(at)[:, None, None], -1).max(0)
        pages = -(-size // 64)
        found = got.stamps[entry : entry + pages].transpose(1, 0, 2).reshape(SMALL.kv, -1)
        assert (found[:, size:] == -1).all()
        sure = (np.abs(grouped) > 1e-3).all(0)
        assert sure.mean() > 0.5
        assert np.array_equal(found[:, :size][sure], want[sure])
        assert len(np.unique(want)) > 10
        row, entry = row + len(at), entry + pages


@pytest.mark.parametrize("name", available())
def test_scores_are_kept_for_observing_where_that_takes_little_memory(
    name: CpuKernel, layout: Layout
) -> None:
    """A row far out sees the same tokens; its scores would take too much: keys are read twice."""
    ops = cpu_attention(name)
    world = make_world(SMALL, layout, pages=8)
    request = world.add(ops, 512)
    q = world.tensor(2, SMALL.q, SMALL.dim)
    near = flat_plan(layout, [(request.slots, [511, 511])])
    far = replace(near, row_positions=np.full(2, (1 << 22) - 1, np.int32))
    asked = Observe(np.array([-8.0, -10.0], np.float32))
    read, found = [], []
    for plan in (near, far):
        before = ops.bytes_read
        found.append(ops.attend(q, world.kv, plan, asked))
        read.append(ops.bytes_read - before)
    assert found[0].hits is not None
    assert found[1].hits is not None
    assert np.array_equal(found[0].hits, found[1].hits)
    assert found[0].hits.any()
    assert torch.equal(found[0].out, found[1].out)
    assert 2 * read[1] == 3 * read[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0, 4000.0])
@pytest.mark.parametrize("name", available())
def test_what_was_noted_while_attending_says_what_all_scores_say(
    name: CpuKernel, layout: Layout, threads: int, sharpness: float
) -> None:
    """Keys are compared with what is known by then of lse2, over several spans and steps."""
    ops = cpu_attention(name, threads)
    world = make_world(SMALL, layout, pages=44)
    request = world.add(ops, 43 * PAGE_TOKENS)
    q = sharpness * world.tensor(5, SMALL.q, SMALL.dim)
    near = flat_plan(layout, [(request.slots, [len(request.k) - 1] * 5)])
    far = replace(near, row_positions=np.full(5, (1 << 22) - 1, np.int32))
    least = -np.log2(len(request.k)) - 1e-4
    for thresholds in ([least, 0.0, -3.0, 5.0, np.inf], [least - 4, -9.0, -1e4, least + 7, least]):
        asked = Observe(np.array(thresholds, np.float32), stamps=True)
        noted, computed = (ops.attend(q, world.kv, plan, asked) for plan in (near, far))
        assert noted.hits is not None
        assert computed.hits is not None
        assert np.array_equal(noted.hits, computed.hits)
        assert noted.hits.any()
        assert torch.equal(noted.out, computed.out)


def test_nothing_is_observed_unless_asked(path: Path) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, Layout.F32, pages=2)
    request = world.add(ops, 10)
    plan = flat_plan(Layout.F32, [(request.slots, [9])])
    q = world.tensor(1, SMALL.q, SMALL.dim)
    assert ops.attend(q, world.kv, plan).hits is None
    nobody = Observe(np.full(1, np.inf, np.float32))
    hits = ops.attend(q, world.kv, plan, nobody).hits
    assert hits is not None
    assert not hits.any()
