"""Triton's kernels against the float64 oracle: through the interpreter, or on a device."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvkeep.attention.planner import FlatPlanner
from kvkeep.ops.layout import TORCH_DTYPE, AttentionPlan, LayerKV, Observe
from kvkeep.types import PAGE_TOKENS, Layout
from tests.forests import Asked, Filled, covers, eager, filled, geometry
from tests.ops.devices import DEVICE, ROW_LAYOUTS, OnDevice, world_of
from tests.oracles import Heads, World, attention_oracle, causal, check, flat_plan, tolerance

TINY = Heads(4, 2, 32)

OTHERS = [pytest.param(x, marks=pytest.mark.slow) for x in ROW_LAYOUTS if x != Layout.ROWS_F32]
FLOAT32 = pytest.mark.parametrize("layout", [Layout.ROWS_F32, *OTHERS], ids=lambda x: x.name)
"""For what takes the interpreter seconds: other types in `make nightly` and on a device."""


@pytest.fixture(params=ROW_LAYOUTS, ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(request.param)


def attend_and_check(
    world: World, ops: OnDevice, positions: list[int], *, q: torch.Tensor | None = None
) -> None:
    request = world.requests[-1]
    if q is None:
        q = world.tensor(len(positions), world.heads.q, world.heads.dim)
    plan = flat_plan(world.layout, [(request.slots, positions)])
    visible = causal(world.heads, positions, len(request.k))
    check(world, ops.attend(q, world.kv, plan), attention_oracle(q, request.k, request.v, visible))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 530])
def test_context_lengths(layout: Layout, length: int) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 12)
    world.add(ops, length)
    attend_and_check(world, ops, [length - 1])


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 65])
def test_rows_of_a_prefill(layout: Layout, rows: int) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 5, seed=rows)
    world.add(ops, 120 + rows)
    attend_and_check(world, ops, list(range(120, 120 + rows)))


@pytest.mark.parametrize(
    "heads",
    [Heads(14, 2, 16), Heads(3, 3, 80), Heads(32, 2, 16), Heads(128, 1, 16), Heads(2, 1, 128)],
    ids=str,
)
def test_head_shapes(layout: Layout, heads: Heads) -> None:
    ops = OnDevice()
    world = world_of(heads, layout, 4)
    world.add(ops, 150)
    attend_and_check(world, ops, [149, 3, 127, 128])


@FLOAT32
def test_more_than_128_pages(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(Heads(1, 1, 16), layout, 133)
    world.add(ops, 131 * PAGE_TOKENS - 5)
    attend_and_check(world, ops, [131 * PAGE_TOKENS - 6])


@pytest.mark.parametrize("loud", [0, 70, 299])
def test_one_huge_score(layout: Layout, loud: int) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 5)
    k = world.tensor(300, TINY.kv, TINY.dim) * 0.1
    k[loud] = 8.0
    world.add(ops, 300, k=k)
    q = torch.full((1, TINY.q, TINY.dim), 4.0, dtype=TORCH_DTYPE[layout])
    attend_and_check(world, ops, [299], q=q)


def test_equal_scores_average_the_values(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 5)
    k = torch.zeros((300, TINY.kv, TINY.dim), dtype=TORCH_DTYPE[layout])
    world.add(ops, 300, k=k)
    attend_and_check(world, ops, [299])


def test_strided_queries_keys_and_values(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 2)
    qkv = world.tensor(70, TINY.q + 2 * TINY.kv, TINY.dim)
    q, k, v = qkv.split_with_sizes((TINY.q, TINY.kv, TINY.kv), dim=1)
    world.add(ops, 70, k=k, v=v)
    attend_and_check(world, ops, list(range(70)), q=q)


def test_append_skips_negative_slots_and_leaves_neighbours(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 2)
    k, v = world.tensor(3, TINY.kv, TINY.dim), world.tensor(3, TINY.kv, TINY.dim)
    before = world.kv.buffer.clone()
    ops.append(world.kv, k, v, np.array([5, -1, 70], np.int32))
    row_bytes = TINY.dim * k.element_size()
    changed = int((world.kv.buffer != before).sum())
    assert 0 < changed <= 2 * 2 * TINY.kv * row_bytes
    tile = int(world.kv.tile_table[1, 1, 0])
    rows = world.kv.buffer.cpu().view(k.dtype).view(-1, 2, PAGE_TOKENS, TINY.dim)[tile]
    assert torch.equal(rows[0, 6], k[2, 0])
    assert torch.equal(rows[1, 6], v[2, 0])


def random_masks(world: World, pages: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint64]]:
    shape = (pages, 2, world.heads.kv)
    masks = world.rng.integers(0, 2**64, shape, np.uint64, endpoint=False)
    masks[0] = np.iinfo(np.uint64).max
    masks[1, 1, 0] = 0
    return masks


def test_live_masks_and_their_bytes(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 6)
    request = world.add(ops, 320)
    masks = random_masks(world, 5)
    positions = [319, 100, 5, 255]
    q = world.tensor(len(positions), TINY.q, TINY.dim)
    live = (masks[:, 1, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    live_tokens = live.astype(bool).transpose(1, 0, 2).reshape(TINY.kv, 320)
    visible = causal(TINY, positions, 320) & live_tokens[None]
    plan = flat_plan(layout, [(request.slots, positions)], masks=masks)
    got = ops.attend(q, world.kv, plan)
    check(world, got, attention_oracle(q, request.k, request.v, visible))
    assert ops.bytes_read == (5 * TINY.kv - 1) * world.kv.unit_bytes


def test_a_fully_masked_row_is_empty_and_needs_no_tile(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 4)
    request = world.add(ops, 130)
    masks = np.zeros((3, 2, TINY.kv), np.uint64)
    masks[2] = 1
    world.kv.tile_table[request.slots[:2]] = -1
    q = world.tensor(2, TINY.q, TINY.dim)
    got = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, [100, 129])], masks=masks))
    assert not got.out[0].any()
    assert bool(torch.isneginf(got.lse2[0]).all())
    torch.testing.assert_close(got.out[1], request.v[128].repeat_interleave(2, 0))


def test_private_tiles(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 8)
    request = world.add(ops, 192)
    stand_in = world.add(ops, 64)
    private = world.kv.tile_table[stand_in.slots].copy()
    private[0, 1, 1] = world.kv.tile_table[request.slots[1], 1, 1]  # head 1 has not diverged
    pages = np.array([request.slots[0], -1, request.slots[2]], np.int32)
    q = world.tensor(1, TINY.q, TINY.dim)
    got = ops.attend(q, world.kv, flat_plan(layout, [(pages, [191])], private_tiles=private))
    request.k[64:128, 0], request.v[64:128, 0] = stand_in.k[:, 0], stand_in.v[:, 0]
    check(world, got, attention_oracle(q, request.k, request.v, causal(TINY, [191], 192)))


def test_no_runs_and_no_rows(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 2)
    assert ops.attend(world.tensor(0, 4, 32), world.kv, flat_plan(layout, [])).out.shape[0] == 0
    plan = flat_plan(layout, [(np.zeros(0, np.int32), [5])])
    got = ops.attend(world.tensor(1, 4, 32), world.kv, plan)
    assert not got.out.any()
    assert bool(torch.isneginf(got.lse2).all())


def test_hits(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 12)
    request = world.add(ops, 700)
    positions = [699, 400, 64, 610]
    thresholds = np.array([-8.5, -8.0, np.inf, -11.0], np.float32)
    q = world.tensor(4, TINY.q, TINY.dim)
    plan = flat_plan(layout, [(request.slots, positions)])
    got = ops.attend(q, world.kv, plan, Observe(thresholds, stamps=True))
    assert got.hits is not None
    exact = attention_oracle(q, request.k, request.v, causal(TINY, positions, 700))
    margin = exact.weights2 - thresholds[:, None, None]
    grouped = margin.reshape(4, TINY.kv, 2, 700).max(axis=(0, 2))
    bits = (got.hits[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    hit = bits.astype(bool).transpose(1, 0, 2).reshape(TINY.kv, -1)
    assert not hit[:, 700:].any()
    sure = np.abs(grouped) > 2e-3
    assert np.array_equal(hit[:, :700][sure], (grouped >= 0)[sure])
    assert 0 < hit.mean() < 1
    assert got.stamps is not None
    stamps = got.stamps.transpose(1, 0, 2).reshape(TINY.kv, -1)
    assert np.array_equal(stamps >= 0, hit)
    assert np.unique(stamps).tolist() == [-1, 400, 610, 699], "rows that looked last"


def test_merged_parts_equal_the_whole() -> None:
    rng = np.random.default_rng(3)
    scores = torch.from_numpy(rng.standard_normal((4, 3, 2, 7)) * 20)
    values = torch.from_numpy(rng.standard_normal((4, 3, 2, 7, 32)))
    scores[1] = -np.inf
    scores[:, 2] = -np.inf
    outs = torch.einsum("nthk,nthkd->nthd", torch.nan_to_num(torch.softmax(scores, -1)), values)
    lse2s = torch.logsumexp(scores, dim=-1) / np.log(2)
    out, lse2 = OnDevice().merge(outs.float(), lse2s.float())
    merged = scores.permute(1, 2, 0, 3).reshape(3, 2, -1)
    weights = torch.nan_to_num(torch.softmax(merged, dim=-1))
    exact = torch.einsum(
        "thk,thkd->thd", weights, values.permute(1, 2, 0, 3, 4).reshape(3, 2, -1, 32)
    )
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=1e-4)
    exact_lse2 = torch.logsumexp(merged, dim=-1) / np.log(2)
    torch.testing.assert_close(lse2.double(), exact_lse2, atol=1e-4, rtol=1e-5)


def test_merging_one_part_and_empty_ones_changes_nothing(layout: Layout) -> None:
    ops = OnDevice()
    part = world_of(TINY, layout, 1).tensor(1, 3, 4, 32)
    lse2 = torch.arange(12, dtype=torch.float32).view(1, 3, 4)
    nothing = torch.full_like(lse2, -np.inf)
    out, total = ops.merge(
        torch.cat([part * 9, part, part * 3]), torch.cat([nothing, lse2, nothing])
    )
    assert torch.equal(out, part[0])
    assert torch.equal(total, lse2[0])


@pytest.fixture(scope="module")
def pools() -> dict[Layout, Filled]:
    return {one: filled(OnDevice(), TINY, one, 24, device=DEVICE) for one in ROW_LAYOUTS}


def check_forest(pool: Filled, asked: list[Asked], ops: OnDevice) -> None:
    """Hold a step's tree and flat plan to the oracle, and the tree's bytes to the plan's."""
    layout, heads = pool.world.layout, pool.heads
    step = geometry(asked, layout)
    tree, flat = eager(heads.q // heads.kv).plan(step), FlatPlanner().plan(step)
    assert tree.parents is not None, "nothing is shared"
    assert covers(tree, step)
    q = pool.queries(step.num_rows)
    for plan in (tree, flat):
        got = ops.attend(q, pool.world.kv, plan)
        row = 0
        for one in asked:
            positions = list(range(one.length - one.rows, one.length))
            k, v = pool.tokens(np.array(one.slots, np.int32), one.length)
            exact = attention_oracle(
                q[row : row + one.rows], k, v, causal(heads, positions, one.length)
            )
            error = np.abs(got.out[row : row + one.rows].double().numpy() - exact.out)
            assert (error <= tolerance(layout, exact.out)).all()
            found = got.lse2[row : row + one.rows].numpy()
            assert np.abs(found - exact.lse2).max() <= 1e-3
            row += one.rows


@FLOAT32
@pytest.mark.parametrize(
    "requests", [2, 17, *(pytest.param(count, marks=pytest.mark.slow) for count in (16, 65))]
)
def test_a_prefix_of_many_requests(
    layout: Layout, pools: dict[Layout, Filled], requests: int
) -> None:
    asked = [Asked([*range(4), 4 + i % 20], 4 * PAGE_TOKENS + 1 + i % 64) for i in range(requests)]
    ops = OnDevice()
    check_forest(pools[layout], asked, ops)
    kv = pools[layout].world.kv
    apart = sum(-(-one.length // PAGE_TOKENS) for one in asked)
    chunks = -(-requests // 64)
    together = 4 * chunks + requests
    assert ops.bytes_read == (together + apart) * kv.num_kv_heads * kv.unit_bytes


@FLOAT32
def test_deep_trees_empty_leaves_several_roots_and_new_tokens(
    layout: Layout, pools: dict[Layout, Filled]
) -> None:
    asked = [
        Asked([*range(8), 20], 8 * PAGE_TOKENS + 5),
        Asked([*range(8), 21, 22], 8 * PAGE_TOKENS + 100, rows=17),
        Asked([*range(4), 23], 4 * PAGE_TOKENS + 1),
        Asked([*range(4)], 4 * PAGE_TOKENS),
        Asked([10, 11, 12, 13, 14], 4 * PAGE_TOKENS + 1),
        Asked([10, 11, 12, 13, 15], 4 * PAGE_TOKENS + 64, rows=3),
    ]
    check_forest(pools[layout], asked, OnDevice(programs=64))


def test_order_of_requests_and_of_programs_is_within_tolerance(pools: dict[Layout, Filled]) -> None:
    pool = pools[Layout.ROWS_F32]
    asked = [Asked([*range(4), 20 + i], 4 * PAGE_TOKENS + 1 + i) for i in range(3)]
    for programs in (1, 16, 1000):
        check_forest(pool, asked[::-1], OnDevice(programs))


def test_a_plan_is_uploaded_once_for_all_layers(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 4)
    world.kv.buffer.zero_()
    request = world.add(ops, 100)
    plan = flat_plan(layout, [(request.slots, [99])])
    q = world.tensor(1, TINY.q, TINY.dim)
    before = ops.inner.transfers
    for layer in (0, 1):
        ops.attend(q, dataclasses.replace(world.kv, layer=layer), plan)
    assert ops.inner.transfers == before + 1
    ops.attend(q, world.kv, dataclasses.replace(plan))
    assert ops.inner.transfers == before + 2


def test_a_table_kept_on_the_device_is_used(layout: Layout) -> None:
    ops = OnDevice()
    world = world_of(TINY, layout, 4)
    there = torch.from_numpy(world.kv.tile_table.copy()).to(DEVICE)
    kept: LayerKV = dataclasses.replace(world.kv, device_table=there)
    world.kv = kept
    world.add(ops, 200)
    attend_and_check(world, ops, [199, 20])


def test_growing_requests_keep_grids_and_places(pools: dict[Layout, Filled]) -> None:
    """What a captured graph holds fixed does not change with a token, nor with a page here."""
    pool, ops = pools[Layout.ROWS_F32], OnDevice()

    def prepared(requests: int, grown: int) -> tuple[object, ...]:
        asked = [
            Asked([*range(4), 10 + i, 16 + i % 6, 22], 4 * PAGE_TOKENS + 1 + i + grown)
            for i in range(requests)
        ]
        plan = eager(2).plan(geometry(asked, Layout.ROWS_F32))
        return ops.inner.prepare(pool.queries(requests).to(DEVICE), pool.world.kv, plan)

    before = ops.inner.transfers
    kept = prepared(6, 0)
    assert all(prepared(6, grown) == kept for grown in range(1, 2 * PAGE_TOKENS))
    assert ops.inner.transfers - before == 2 * PAGE_TOKENS, "one upload a step"
    assert prepared(12, 0) != kept


@pytest.mark.gpu
def test_a_captured_graph_attends_the_plans_that_come_after() -> None:
    layout, count = Layout.ROWS_BF16, 20
    pool = filled(OnDevice(), Heads(8, 2, 128), layout, 60, device=DEVICE)
    kv, attention = pool.world.kv, OnDevice(programs=264).inner

    def plan(grown: int) -> AttentionPlan:
        asked = [Asked([*range(32), 33 + i], 32 * PAGE_TOKENS + 1 + grown) for i in range(count)]
        return eager(4).plan(geometry(asked, layout))

    q = pool.queries(count).to(DEVICE)
    attention.attend(q, kv, plan(0))
    first = plan(0)
    kept = attention.prepare(q, kv, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention.attend(q, kv, first)
    for grown in range(1, 40):
        later = plan(grown)
        assert attention.prepare(q, kv, later) == kept
        q.copy_(pool.queries(count))
        graph.replay()
        want = OnDevice(programs=264).inner.attend(q, kv, later)
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse2, want.lse2)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(14, 2, 64), Heads(16, 1, 128)], ids=str)
def test_bfloat16_at_real_shapes(heads: Heads) -> None:
    ops = OnDevice(programs=264)
    world = world_of(heads, Layout.ROWS_BF16, 80)
    world.add(ops, 4100)
    attend_and_check(world, ops, [4099, 4098, 4097, 2000, 64])


@pytest.mark.gpu
def test_bfloat16_trees() -> None:
    pool = filled(OnDevice(), Heads(8, 2, 128), Layout.ROWS_BF16, 140, device=DEVICE)
    asked = [Asked([*range(64), 70 + i], 64 * PAGE_TOKENS + 1 + i % 64) for i in range(65)]
    check_forest(pool, asked, OnDevice(programs=264))
