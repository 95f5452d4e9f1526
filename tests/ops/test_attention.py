"""Attention against the float64 oracle, on every path this machine runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.ops.cpu import available
from kvkeep.ops.layout import (
    TORCH_DTYPE,
    AttentionOps,
    float_tile_bytes,
)
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import ALL_LIVE, PAGE_TOKENS, Layout
from tests.counts import examples
from tests.ops.paths import PATHS, Path, cpu_attention, ops_for
from tests.oracles import (
    Heads,
    World,
    attention_oracle,
    causal,
    check,
    flat_plan,
    make_world,
)

SMALL = Heads(4, 2, 64)


def attend_and_check(
    world: World,
    ops: AttentionOps,
    positions: list[int],
    *,
    q: torch.Tensor | None = None,
) -> None:
    request = world.requests[-1]
    if q is None:
        q = world.tensor(len(positions), world.heads.q, world.heads.dim)
    plan = flat_plan(world.layout, [(request.slots, positions)])
    visible = causal(world.heads, positions, len(request.k))
    check(world, ops.attend(q, world.kv, plan), attention_oracle(q, request.k, request.v, visible))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2055])
def test_context_lengths(path: Path, layout: Layout, length: int) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=40)
    world.add(ops, length)
    attend_and_check(world, ops, [length - 1])


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 129])
def test_row_counts(path: Path, layout: Layout, rows: int) -> None:
    ops = ops_for(path, threads=2)
    world = make_world(SMALL, layout, pages=8, seed=rows)
    world.add(ops, 200 + rows)
    attend_and_check(world, ops, list(range(200, 200 + rows)))


@pytest.mark.parametrize(
    "heads",
    [
        Heads(14, 2, 64),
        Heads(16, 8, 128),
        Heads(3, 3, 80),
        Heads(4, 2, 96),
        Heads(32, 2, 16),
        Heads(20, 1, 48),
        Heads(130, 1, 112),
        Heads(2, 1, 256),
    ],
    ids=str,
)
def test_head_shapes(path: Path, layout: Layout, heads: Heads) -> None:
    ops = ops_for(path)
    world = make_world(heads, layout, pages=8)
    world.add(ops, 150)
    attend_and_check(world, ops, [149, 3, 127, 128])


def test_more_than_128_pages(path: Path, layout: Layout) -> None:
    ops = ops_for(path, threads=2)
    world = make_world(Heads(2, 1, 64), layout, pages=140)
    world.add(ops, 131 * PAGE_TOKENS - 5)
    attend_and_check(world, ops, [131 * PAGE_TOKENS - 6])


@pytest.mark.parametrize("loud", [0, 70, 1199])
def test_one_huge_score(path: Path, layout: Layout, loud: int) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=20)
    k = world.tensor(1200, SMALL.kv, SMALL.dim) * 0.1
    k[loud] = 8.0
    world.add(ops, 1200, k=k)
    q = torch.full((1, SMALL.q, SMALL.dim), 4.0, dtype=TORCH_DTYPE[layout])
    attend_and_check(world, ops, [1199], q=q)


def test_equal_scores_average_the_values(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=20)
    k = torch.zeros((1100, SMALL.kv, SMALL.dim), dtype=TORCH_DTYPE[layout])
    request = world.add(ops, 1100, k=k)
    q = world.tensor(1, SMALL.q, SMALL.dim)
    got = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, [1099])]))
    torch.testing.assert_close(got.lse2, torch.full((1, SMALL.q), np.log2(1100.0)).float())
    mean = request.v.double().mean(0).repeat_interleave(2, 0)[None]
    assert (got.out.double() - mean).abs().max() <= 2e-3 * request.v.double().abs().max()


def test_scores_far_apart_stay_finite(path: Path) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, Layout.F32, pages=20)
    k = world.tensor(300, SMALL.kv, SMALL.dim) * 20
    world.add(ops, 300, k=k)
    attend_and_check(world, ops, [299, 128], q=world.tensor(2, SMALL.q, SMALL.dim) * 10)


def test_strided_queries_keys_and_values(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=8)
    fused = world.tensor(140, SMALL.q + 2 * SMALL.kv, SMALL.dim)
    q, k, v = torch.split(fused, [SMALL.q, SMALL.kv, SMALL.kv], dim=1)
    world.add(ops, 140, k=k, v=v)
    positions = list(range(140))
    attend_and_check(world, ops, positions, q=q)
    by_head = q.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    attend_and_check(world, ops, positions, q=by_head)


def test_append_skips_negative_slots_and_leaves_neighbours(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=4)
    request = world.add(ops, 64)
    before = world.kv.buffer.clone()
    again = world.tensor(3, SMALL.kv, SMALL.dim)
    slots = np.array([-1, int(request.slots[0]) * PAGE_TOKENS + 7, -1], np.int32)
    ops.append(world.kv, again, again, slots)
    changed = int((world.kv.buffer != before).sum())
    row_bytes = 2 * SMALL.kv * SMALL.dim * again.element_size()
    assert 0 < changed <= row_bytes
    request.k[7], request.v[7] = again[1], again[1]
    attend_and_check(world, ops, [63])


def mixed_masks(world: World, pages: int) -> np.ndarray:
    masks = world.rng.integers(0, 2**64, (pages, 2, world.heads.kv), np.uint64)
    masks[1] = 0
    masks[2, :, 0] = ALL_LIVE
    return masks


def test_live_masks(path: Path, layout: Layout) -> None:
    ops = ops_for(path, threads=2)
    world = make_world(SMALL, layout, pages=8)
    request = world.add(ops, 320)
    masks = mixed_masks(world, 5)
    positions = [319, 100, 5, 320 - 65]
    q = world.tensor(len(positions), SMALL.q, SMALL.dim)
    live = (masks[:, 1, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    live_tokens = live.astype(bool).transpose(1, 0, 2).reshape(SMALL.kv, 320)
    visible = causal(SMALL, positions, 320) & live_tokens[None]
    got = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, positions)], masks=masks))
    check(world, got, attention_oracle(q, request.k, request.v, visible))


def test_a_fully_masked_row_is_empty(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=4)
    request = world.add(ops, 130)
    masks = np.zeros((3, 2, SMALL.kv), np.uint64)
    masks[2] = 1
    q = world.tensor(2, SMALL.q, SMALL.dim)
    got = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, [100, 129])], masks=masks))
    assert not got.out[0].any()
    assert bool(torch.isneginf(got.lse2[0]).all())
    only = request.v[128].repeat_interleave(2, 0)
    torch.testing.assert_close(got.out[1], only)


def test_private_tiles(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=8)
    request = world.add(ops, 192)
    stand_in = world.add(ops, 64)
    private = world.kv.tile_table[stand_in.slots].copy()
    private[0, 1, 1] = world.kv.tile_table[request.slots[1], 1, 1]  # head 1 has not diverged
    pages = np.array([request.slots[0], -1, request.slots[2]], np.int32)
    q = world.tensor(1, SMALL.q, SMALL.dim)
    got = ops.attend(q, world.kv, flat_plan(layout, [(pages, [191])], private_tiles=private))
    request.k[64:128, 0], request.v[64:128, 0] = stand_in.k[:, 0], stand_in.v[:, 0]
    check(
        world,
        got,
        attention_oracle(q, request.k, request.v, causal(SMALL, [191], 192)),
    )


def test_no_runs_and_no_rows(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=2)
    nothing = ops.attend(world.tensor(0, 4, 64), world.kv, flat_plan(layout, []))
    assert nothing.out.shape == (0, 4, 64)
    plan = flat_plan(layout, [(np.zeros(0, np.int32), [5])])
    got = ops.attend(world.tensor(1, 4, 64), world.kv, plan)
    assert not got.out.any()
    assert bool(torch.isneginf(got.lse2).all())


@settings(max_examples=examples(10, 25), deadline=None)
@given(
    parts=st.integers(1, 5),
    seed=st.integers(0, 99),
    empty=st.sets(st.integers(0, 4)),
)
@pytest.mark.parametrize("name", PATHS)
def test_merged_parts_equal_the_whole(name: Path, parts: int, seed: int, empty: set[int]) -> None:
    rng = np.random.default_rng(seed)
    ops = ops_for(name)
    scores = torch.from_numpy(rng.standard_normal((parts, 3, 2, 7)) * 20)
    values = torch.from_numpy(rng.standard_normal((parts, 3, 2, 7, 32)))
    for part in empty & set(range(parts)):
        scores[part] = -np.inf
    held = torch.nan_to_num(torch.softmax(scores, dim=-1))
    outs = torch.einsum("nthk,nthkd->nthd", held, values)
    lse2s = torch.logsumexp(scores, dim=-1) / np.log(2)
    out, lse2 = ops.merge(outs.float(), lse2s.float())
    merged = scores.permute(1, 2, 0, 3).reshape(3, 2, -1)
    weights = torch.nan_to_num(torch.softmax(merged, dim=-1))
    exact = torch.einsum(
        "thk,thkd->thd", weights, values.permute(1, 2, 0, 3, 4).reshape(3, 2, -1, 32)
    )
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=1e-4)
    exact_lse2 = torch.logsumexp(merged, dim=-1) / np.log(2)
    torch.testing.assert_close(lse2.double(), exact_lse2, atol=1e-4, rtol=1e-5)


def test_merging_one_part_or_empty_parts_changes_nothing(path: Path, layout: Layout) -> None:
    ops = ops_for(path)
    world = make_world(SMALL, layout, pages=2)
    part = world.tensor(1, 3, 4, 64)
    lse2 = torch.arange(12, dtype=torch.float32).view(1, 3, 4)
    out, total = ops.merge(part, lse2)
    assert torch.equal(out, part[0])
    assert torch.equal(total, lse2[0])
    nothing = torch.full_like(lse2, -np.inf)
    out, total = ops.merge(
        torch.cat([part * 9, part, part * 3]), torch.cat([nothing, lse2, nothing])
    )
    assert torch.equal(out, part[0])
    assert torch.equal(total, lse2[0])


def test_counters(layout: Layout) -> None:
    heads = Heads(14, 2, 64)
    ops = cpu_attention(available()[-1])
    world = make_world(heads, layout, pages=8)
    request = world.add(ops, 200)
    assert (ops.calls, ops.bytes_read) == (0, 0)
    tile = float_tile_bytes(layout, 64)
    ops.attend(world.tensor(1, 14, 64), world.kv, flat_plan(layout, [(request.slots, [199])]))
    assert (ops.calls, ops.bytes_read) == (1, 4 * heads.kv * tile)  # once per KV head, not per head
    ops.attend(world.tensor(1, 14, 64), world.kv, flat_plan(layout, [(request.slots, [100])]))
    assert (ops.calls, ops.bytes_read) == (2, 6 * heads.kv * tile)
    reference = ReferenceAttention()
    reference.attend(world.tensor(1, 14, 64), world.kv, flat_plan(layout, [(request.slots, [9])]))
    assert reference.calls == 1
