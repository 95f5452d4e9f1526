"""A row's bits depend on its own tokens and position alone, on every path and in both dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvkeep.ops.cpu import CpuKernel, available, cpu_ops
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import Attended, AttentionPlan, Observe
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout
from tests.oracles import Heads, Request, World, flat_plan, make_world

SHAPES = [Heads(14, 2, 64), Heads(4, 4, 128), Heads(6, 1, 80)]
LENGTHS = [1, 64, 129, 1024, 1031, 2150]


def cpu_attention(path: CpuKernel, threads: int = 1) -> CpuAttention:
    attention = cpu_ops(path, threads).attention
    assert isinstance(attention, CpuAttention)
    return attention


@pytest.fixture(params=available())
def path(request: pytest.FixtureRequest) -> CpuKernel:
    name: CpuKernel = request.param
    return name


@pytest.fixture(params=[Layout.F32, Layout.BF16], ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(request.param)


@pytest.fixture(params=SHAPES, ids=str)
def heads(request: pytest.FixtureRequest) -> Heads:
    shape = request.param
    assert isinstance(shape, Heads)
    return shape


def same(got: Attended, want: Attended) -> bool:
    return torch.equal(got.lse2, want.lse2) and torch.equal(
        got.out.view(torch.uint8), want.out.view(torch.uint8)
    )


def pick(whole: Attended, rows: slice | list[int]) -> Attended:
    return Attended(whole.out[rows].contiguous(), whole.lse2[rows], None)


def filled(heads: Heads, layout: Layout, lengths: list[int], seed: int = 0) -> World:
    pages = sum(-(-n // PAGE_TOKENS) for n in lengths) + 3
    world = make_world(heads, layout, pages=pages, seed=seed)
    writer = cpu_attention("portable")
    for length in lengths:
        world.add(writer, length)
    return world


def decode_plan(world: World, which: list[int]) -> AttentionPlan:
    parts = [(world.requests[i].slots, [len(world.requests[i].k) - 1]) for i in which]
    return flat_plan(world.layout, parts)


def test_alone_in_a_batch_and_in_any_order(path: CpuKernel, layout: Layout, heads: Heads) -> None:
    world = filled(heads, layout, LENGTHS)
    q = world.tensor(len(LENGTHS), heads.q, heads.dim)
    one, two = cpu_attention(path, 1), cpu_attention(path, 2)
    order = list(range(len(LENGTHS)))
    batch = one.attend(q, world.kv, decode_plan(world, order))
    assert same(two.attend(q, world.kv, decode_plan(world, order)), batch)
    mixed = [3, 0, 5, 1, 4, 2]
    assert same(two.attend(q[mixed], world.kv, decode_plan(world, mixed)), pick(batch, mixed))
    for i in order:
        for ops in (one, two):
            alone = ops.attend(q[i : i + 1], world.kv, decode_plan(world, [i]))
            assert same(alone, pick(batch, [i]))


@pytest.mark.parametrize("cuts", [[1300], [1, 63, 64, 65, 500, 1024, 1300], [128, 1037, 1300]])
def test_any_chunking_of_a_prefill(
    path: CpuKernel, layout: Layout, heads: Heads, cuts: list[int]
) -> None:
    length = 1300
    world = make_world(heads, layout, pages=24)
    writer = cpu_attention("portable")
    request = world.add(writer, length)
    q = world.tensor(length, heads.q, heads.dim)
    whole = cpu_attention(path, 2).attend(
        q, world.kv, flat_plan(layout, [(request.slots, range(length))])
    )
    # The same rows written chunk by chunk into other pages, the rest of them still unwritten.
    again = make_world(heads, layout, pages=24, seed=7)
    ops = cpu_attention(path, 1)
    slots = np.array([again.free.pop() for _ in range(21)], np.int32)
    begin = 0
    for end in cuts:
        append_rows(again, request, slots, begin, end)
        used = slots[: -(-end // PAGE_TOKENS)]
        plan = flat_plan(layout, [(used, range(begin, end))])
        chunk = ops.attend(q[begin:end], again.kv, plan)
        assert same(chunk, pick(whole, slice(begin, end)))
        begin = end


def append_rows(world: World, source: Request, slots: Int32Array, begin: int, end: int) -> None:
    at = np.arange(begin, end, dtype=np.int32)
    rows = slots[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS
    cpu_attention("portable").append(
        world.kv, source.k[begin:end], source.v[begin:end], rows.astype(np.int32)
    )


def test_a_row_of_a_prefill_equals_the_same_row_decoded(
    path: CpuKernel, layout: Layout, heads: Heads
) -> None:
    world = filled(heads, layout, [1200])
    request = world.requests[0]
    q = world.tensor(1200, heads.q, heads.dim)
    ops = cpu_attention(path, 2)
    whole = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, range(1200))]))
    for position in (0, 1, 62, 63, 64, 127, 128, 700, 1023, 1024, 1199):
        plan = flat_plan(layout, [(request.slots, [position])])  # with pages beyond the position
        got = ops.attend(q[position : position + 1], world.kv, plan)
        assert same(got, pick(whole, [position]))


def test_positions_in_any_order_within_a_group(
    path: CpuKernel, layout: Layout, heads: Heads
) -> None:
    world = filled(heads, layout, [1100])
    request = world.requests[0]
    q = world.tensor(90, heads.q, heads.dim)
    positions = world.rng.integers(0, 1100, 90).tolist()
    ops = cpu_attention(path, 2)
    got = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, positions)]))
    for row in range(0, 90, 7):
        plan = flat_plan(layout, [(request.slots, [positions[row]])])
        assert same(ops.attend(q[row : row + 1], world.kv, plan), pick(got, [row]))


def test_shuffled_page_slots_and_runs_cut_at_steps(
    path: CpuKernel, layout: Layout, heads: Heads
) -> None:
    world = filled(heads, layout, [2150])
    request = world.requests[0]
    q = world.tensor(1, heads.q, heads.dim)
    ops = cpu_attention(path, 1)
    want = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, [2149])]))
    other = make_world(heads, layout, pages=40, seed=5)
    moved = other.add(ops, 2150, k=request.k, v=request.v)
    assert not np.array_equal(moved.slots, request.slots)
    assert same(ops.attend(q, other.kv, flat_plan(layout, [(moved.slots, [2149])])), want)
    cut = AttentionPlan(
        np.array([2149], np.int32),
        np.array([[0, 1, 0, 3]], np.int32),
        np.array([[0, 2, 0, layout], [2, 10, 128, layout], [12, 22, 768, layout]], np.int32),
        request.slots,
    )
    assert same(ops.attend(q, world.kv, cut), want)


def test_masks_of_ones_change_nothing_and_masked_tokens_weigh_nothing(
    path: CpuKernel, layout: Layout, heads: Heads
) -> None:
    world = filled(heads, layout, [400])
    request = world.requests[0]
    q = world.tensor(3, heads.q, heads.dim)
    positions = [399, 64, 200]
    ops = cpu_attention(path, 2)
    want = ops.attend(q, world.kv, flat_plan(layout, [(request.slots, positions)]))
    masks = np.full((7, 2, heads.kv), 2**64 - 1, np.uint64)
    plan = flat_plan(layout, [(request.slots, positions)], masks=masks)
    assert same(ops.attend(q, world.kv, plan), want)
    masks[2] = 0xFFFF_0000_FFFF_0000
    plan = flat_plan(layout, [(request.slots, positions)], masks=masks)
    masked = ops.attend(q, world.kv, plan)
    assert not same(masked, want)
    k, v = request.k.clone(), request.v.clone()
    gone = [128 + t for t in range(64) if not 0xFFFF_0000_FFFF_0000 >> t & 1]
    k[gone], v[gone] = 1e4, -1e4
    append_rows(world, Request(k, v, request.slots), request.slots, 0, 400)
    assert same(ops.attend(q, world.kv, plan), masked)


def test_observing_changes_no_bit_and_hits_do_not_depend_on_threads(
    path: CpuKernel, layout: Layout, heads: Heads
) -> None:
    world = filled(heads, layout, [2150, 90])
    q = world.tensor(2, heads.q, heads.dim)
    plan = decode_plan(world, [0, 1])
    observe = Observe(np.array([-10, -6], np.float32))
    want = cpu_attention(path, 1).attend(q, world.kv, plan, observe)
    got = cpu_attention(path, 2).attend(q, world.kv, plan, observe)
    assert same(got, want)
    assert same(cpu_attention(path, 2).attend(q, world.kv, plan), want)
    assert got.hits is not None
    assert got.hits.any()
    assert want.hits is not None
    assert np.array_equal(got.hits, want.hits)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_calls_with_one_plan(path: CpuKernel, layout: Layout, threads: int) -> None:
    world = filled(SHAPES[0], layout, [2150])
    plan = decode_plan(world, [0])
    ops = cpu_attention(path, threads)
    q, other = world.tensor(1, 14, 64), world.tensor(1, 14, 64)
    first = ops.attend(q, world.kv, plan)
    assert not same(ops.attend(other, world.kv, plan), first)
    assert same(ops.attend(q, world.kv, plan), first)


def test_append_is_the_same_on_all_paths(path: CpuKernel, layout: Layout, heads: Heads) -> None:
    lengths = [300]
    ours, reference = (make_world(heads, layout, pages=8) for _ in range(2))
    ours.add(cpu_attention(path, 2), lengths[0])
    reference.add(ReferenceAttention(), lengths[0])
    assert torch.equal(ours.kv.buffer, reference.kv.buffer)


def test_the_reference_keeps_bits_too(layout: Layout) -> None:
    world = filled(Heads(4, 2, 64), layout, [200, 70])
    q = world.tensor(3, 4, 64)
    parts = [(world.requests[0].slots, [198, 199]), (world.requests[1].slots, [69])]
    ops = ReferenceAttention()
    batch = ops.attend(q, world.kv, flat_plan(layout, parts))
    for i, (slots, position) in enumerate([(0, 198), (0, 199), (1, 69)]):
        plan = flat_plan(layout, [(world.requests[slots].slots, [position])])
        assert same(ops.attend(q[i : i + 1], world.kv, plan), pick(batch, [i]))
