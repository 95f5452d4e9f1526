"""Triton's kernels on codes: against the reference, to the bit where only integers are summed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops import codes as coded
from kvkeep.ops import reference_codes as by_reference
from kvkeep.ops import triton_codes
from kvkeep.ops.layout import Attended, AttentionPlan, Observe
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import PAGE_TOKENS, Layout
from tests.coded import CodedWorld, coded_plan, make_coded_world, random_codes
from tests.ops.code_kernels import integer_sums, nearest_of
from tests.ops.coded_devices import plan_on_device, pool_on_device
from tests.ops.devices import OnDevice
from tests.ops.test_attention_codes_bits import tree_plan
from tests.oracles import Heads, attention_oracle, tolerance

CODED = list(coded.CODE_BITS)
DIMS = [16, 64, 80, 96, 128, 256]
EVERY = [(layout, dim, group) for layout in CODED for dim in (64, 128) for group in (1, 2, 4, 7)]
SOME = [
    (Layout.K2V2, 64, 7),
    (Layout.K2V2, 128, 2),
    (Layout.K4V2, 64, 4),
    (Layout.K4V4, 128, 1),
    (Layout.K8V8, 96, 4),
]


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


def test_host_and_kernels_agree_on_numbers() -> None:
    assert triton_codes.SINKS.value == coded.SINK_TOKENS
    assert triton_codes.LEAST.value == by_reference.LEAST


@pytest.mark.parametrize(("layout", "dim", "group"), SOME)
def test_the_reference_agrees(layout: Layout, dim: int, group: int) -> None:
    world = make_coded_world(Heads(group, 1, dim), Layout.F32, pages=4, mebibytes=1, seed=dim)
    attend_and_check(world, coded_plan(world, [(world.add(layout, 2, 33), [160, 70])]))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dim", "group"), EVERY)
def test_the_reference_agrees_at_length(layout: Layout, dim: int, group: int) -> None:
    world = make_coded_world(Heads(2 * group, 2, dim), Layout.F32, pages=24, seed=dim)
    parts = [
        (world.add(layout, pages, tail), rows)
        for pages, tail, rows in [(3, 0, [191, 3, 64]), (4, 100, [355]), (2, 70, [197])]
    ]
    attend_and_check(world, coded_plan(world, parts))


@pytest.mark.slow
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("layout", CODED)
def test_any_dim_and_any_class_of_rows(layout: Layout, dim: int) -> None:
    world = make_coded_world(Heads(3, 1, dim), Layout.F32, pages=9)
    parts = [(world.add(layout, 2, 1), list(range(128 - rows, 129))) for rows in (1, 9, 40)]
    attend_and_check(world, coded_plan(world, parts))


def test_rows_of_a_prompt_in_one_task() -> None:
    world = make_coded_world(Heads(7, 1, 64), Layout.F32, pages=8, mebibytes=1)
    context = world.add(Layout.K2V2, 2, 20)
    attend_and_check(world, coded_plan(world, [(context, list(range(127, 132)))]))


def test_half_precision_queries() -> None:
    world = make_coded_world(Heads(4, 1, 64), Layout.F32, pages=4, mebibytes=1)
    plan = coded_plan(world, [(world.add(Layout.K4V2, 2, 0), [127])])
    q = world.tensor(1, 4, 64).half()
    want = ReferenceAttention().attend(q.float(), world.kv, plan)
    got = OnDevice().attend(q, pool_on_device(world), plan)
    assert got.out.dtype == torch.float16
    allowed = 4e-3 * float(want.out.abs().max())
    torch.testing.assert_close(got.out.float(), want.out, atol=allowed, rtol=0)


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("dim", DIMS)
def test_sums_of_integers_are_exact(layout: Layout, dim: int) -> None:
    rng = np.random.default_rng(dim)
    codes = random_codes(rng, layout, 1, dim)
    tile = coded.pack_codes(codes, layout)[0]
    channels = coded.partition_channels(dim)
    h = dim // channels - 1
    signed = torch.from_numpy(rng.integers(-127, 128, (16, channels)).astype(np.int8))
    top = torch.from_numpy(rng.integers(0, 256, (16, PAGE_TOKENS)).astype(np.uint8))
    signed[0], top[0], top[1] = 127, 255, 0
    keys, values = integer_sums(tile, layout, dim, h, signed, top)
    own = slice(h * channels, (h + 1) * channels)
    assert torch.equal(keys, signed.int() @ codes.k[0, :, own].int().T)
    assert torch.equal(values, top.int() @ codes.v[0, :, own].int())


@pytest.mark.parametrize("top", [by_reference.QUERY_TOP, by_reference.WEIGHT_TOP])
def test_bytes_are_the_references(top: int) -> None:
    x = torch.from_numpy(np.random.default_rng(top).standard_normal((16, 64), np.float32))
    x = x.abs() if top == by_reference.WEIGHT_TOP else x
    x[1], x[2], x[3] = 0, x[2] * 2.0**-110, x[3] * 1e30
    x[4] = torch.arange(64) / 2 * (top / 63)  # many lie next to a half
    x[4, 0] = float(top)
    quantise = by_reference.quantise_query
    if top == by_reference.WEIGHT_TOP:
        quantise = by_reference.quantise_weights
    integers, scales = nearest_of(x, top)
    want = quantise(x)
    assert torch.equal(scales, want.scale)
    assert torch.equal(integers * (integers != 0), want.integers * (want.integers != 0))


def test_sinks_are_read_in_16_bits() -> None:
    """With only the sinks alive, the result is theirs; their codes are never looked at."""
    world = make_coded_world(Heads(3, 1, 128), Layout.F32, pages=4, mebibytes=1)
    codes = random_codes(world.rng, Layout.K2V2, 1, 128)
    codes.k[:, : coded.SINK_TOKENS] = 3
    codes.v[:, : coded.SINK_TOKENS] = 3
    context = world.add(Layout.K2V2, 2, 0, [codes, random_codes(world.rng, Layout.K2V2, 1, 128)])
    masks = np.zeros((2, 2, 1), np.uint64)
    masks[0, 1, 0] = 15
    q = world.tensor(1, 3, 128)
    got = OnDevice().attend(
        q, pool_on_device(world), coded_plan(world, [(context, [127])], masks=masks)
    )
    assert context.coded[0].sinks is not None
    k, v = (x[0].float() for x in context.coded[0].sinks)
    scores = q[0] @ k.T / math.sqrt(128)
    np.testing.assert_allclose(got.out[0], torch.softmax(scores, 1) @ v, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        got.lse2[0], torch.logsumexp(scores, 1) / math.log(2), rtol=0, atol=1e-5
    )


def test_constant_pages_zeros_denormals_and_outliers() -> None:
    world = make_coded_world(Heads(4, 1, 64), Layout.F32, pages=8, mebibytes=1)
    codes = [random_codes(world.rng, Layout.K2V2, 1, 64) for _ in range(4)]
    codes[0] = replace(codes[0], k=codes[0].k * 0, v=codes[0].v * 0)  # constant: mins alone
    codes[1] = replace(codes[1], k_scale=codes[1].k_scale * 0, v_scale=codes[1].v_scale * 0)
    codes[2] = replace(codes[2], k_scale=codes[2].k_scale * 1e-39, v_min=codes[2].v_min * 1e-39)
    codes[3].k_scale[:, 7] = 1e4
    codes[3].v_scale[:, :, 9] = 1e4
    context = world.add(Layout.K2V2, 4, 0, codes)
    attend_and_check(world, coded_plan(world, [(context, [255])]))


def test_masks_hits_and_bytes() -> None:
    world = make_coded_world(Heads(2, 1, 64), Layout.F32, pages=8, mebibytes=1)
    context = world.add(Layout.K4V2, 4, 20)
    masks = world.rng.integers(0, 2**64, (len(context.slots), 2, 1), np.uint64)
    masks[2, 1, 0] = 0
    plan = coded_plan(world, [(context, [275, 70])], masks=masks)
    q = world.tensor(2, 2, 64)
    observe = Observe(np.array([-7.0, np.inf], np.float32))
    want = ReferenceAttention().attend(q, world.kv, plan, observe)
    there = pool_on_device(world)
    there.tile_table[context.slots[2], 1] = -1  # of a page without a live token
    ops = OnDevice()
    got = ops.attend(q, there, plan_on_device(world, plan), observe)
    near(world, got, want)
    assert got.hits is not None
    assert want.hits is not None
    assert got.hits.any()
    assert np.bitwise_count(got.hits ^ want.hits).sum() <= 2  # at the threshold itself
    tiles = 2 * coded.tile_bytes(Layout.K4V2, 64) + coded.tile_bytes(Layout.K4V2, 64, first=True)
    assert ops.bytes_read == tiles + coded.tile_bytes(Layout.F32, 64)


def test_private_tiles() -> None:
    world = make_coded_world(Heads(2, 1, 64), Layout.F32, pages=8, mebibytes=1)
    context, other = world.add(Layout.K2V2, 2, 10), world.add(Layout.K2V2, 4, 0)
    plan = coded_plan(world, [(context, [137])])
    pages = plan.pages.copy()
    pages[1] = -1
    own = world.kv.tile_table[other.slots[3:]].copy()
    own[:, 0] = own[:, 1]
    attend_and_check(world, replace(plan, pages=pages, private_tiles=own))


def test_trees_and_several_tasks_for_a_row() -> None:
    world = make_coded_world(Heads(4, 1, 64), Layout.F32, pages=12, mebibytes=1)
    context = world.add(Layout.K2V2, 8, 2 * PAGE_TOKENS)
    pages, floats = context.slots.tolist(), context.slots[8:].tolist()
    owners = [[pages[4], pages[5], floats[0]], [floats[1]]]
    tree, flat = tree_plan(world, context, 4, owners, [1, 1])
    attend_and_check(world, tree, OnDevice(programs=64))
    attend_and_check(world, flat, OnDevice(programs=1))


def test_codes_widened_to_floats() -> None:
    """The baseline equals attention on what the codes stand for."""
    world = make_coded_world(Heads(3, 1, 128), Layout.F32, pages=4, mebibytes=1)
    context = world.add(Layout.K8V8, 2, 0)
    codes = [page.codes for page in context.coded]
    k = torch.cat([x.k[0] * x.k_scale[0].float() + x.k_min[0].float() for x in codes])
    scale, low = (
        torch.cat([y.float().repeat_interleave(64, 0).T for y in ys])
        for ys in ([x.v_scale[0] for x in codes], [x.v_min[0] for x in codes])
    )
    v = torch.cat([x.v[0] for x in codes]) * scale + low
    assert context.coded[0].sinks is not None
    k[: coded.SINK_TOKENS], v[: coded.SINK_TOKENS] = (x[0].float() for x in context.coded[0].sinks)
    q = world.tensor(1, 3, 128)
    ops = OnDevice(decode=True)
    got = ops.attend(q, pool_on_device(world), coded_plan(world, [(context, [127])]))
    exact = attention_oracle(q, k[:, None], v[:, None], np.ones((1, 1, 128), np.bool_))
    np.testing.assert_allclose(got.out, exact.out, rtol=0, atol=1e-5 * np.abs(exact.out).max())
    assert ops.inner.decode_calls == 2


def test_plans_that_do_not_fit_are_refused() -> None:
    world = make_coded_world(Heads(2, 1, 64), Layout.F32, pages=5, mebibytes=1)
    plan = coded_plan(world, [(world.add(Layout.K2V2, 2, 0), [127])])
    mixed = coded_plan(world, [(world.add(Layout.K2V2, 2, 1), [128])])
    q, kv = world.tensor(1, 2, 64), pool_on_device(world)
    end = kv.buffer.numel() // kv.unit_bytes
    first = coded.tile_bytes(Layout.K2V2, 64, first=True) // kv.unit_bytes
    kv.tile_table[plan.pages[0]] = end - first + 1
    with pytest.raises(KernelInputError, match="without a tile"):
        OnDevice().attend(q, kv, plan)
    with pytest.raises(KernelInputError, match="units of 192 bytes"):
        OnDevice().attend(q, replace(kv, unit_bytes=192), plan)
    by_head = replace(plan, runs=np.array([[0, 2, 0, int(Layout.BY_HEAD)]], np.int32))
    of_head = replace(kv, coded=np.array([Layout.K2V2], np.int32))
    for refused, there in ((mixed, kv), (by_head, of_head)):
        with pytest.raises(KernelInputError, match="neither coded"):
            OnDevice().attend(q, there, refused)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(14, 2, 64), Heads(16, 1, 128)], ids=str)
def test_bfloat16_at_real_shapes(layout: Layout, heads: Heads) -> None:
    world = make_coded_world(heads, Layout.BF16, pages=80, mebibytes=64)
    parts = [
        (world.add(layout, 40, 150), [40 * PAGE_TOKENS + i for i in (0, 149)]),
        (world.add(layout, 20, 65), [20 * PAGE_TOKENS + 64, 1000, 64]),
    ]
    attend_and_check(world, coded_plan(world, parts), OnDevice(programs=264))
