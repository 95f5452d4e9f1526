"""Native attention on codes: against the reference, to the bit where only integers are summed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.codes import CODE_BITS, SINK_TOKENS, Codes, partition_channels, tile_bytes
from kvkeep.ops.cpu import CpuKernel, available, decoding_attention
from kvkeep.ops.layout import Attended, Observe
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import PAGE_TOKENS, Layout
from tests.coded import CodedWorld, coded_plan, make_coded_world, random_codes
from tests.ops.paths import cpu_attention
from tests.oracles import Heads, attention_oracle, tolerance

CODED = list(CODE_BITS)
SHAPES = [
    (16, Layout.F32),
    (64, Layout.BF16),
    (80, Layout.BF16),
    (96, Layout.F32),
    (128, Layout.BF16),
    (256, Layout.F32),
]


@pytest.fixture(params=available())
def path(request: pytest.FixtureRequest) -> CpuKernel:
    name: CpuKernel = request.param
    return name


def near(world: CodedWorld, got: Attended, want: Attended) -> None:
    """Hold a result within the model's tolerance and a few weights that round the other way."""
    exact = want.out.double().numpy()
    allowed = tolerance(world.model, exact) + 2e-3 * np.abs(exact).max()
    error = np.abs(got.out.double().numpy() - exact)
    assert (error <= allowed).all(), f"worst {error.max():.2e}, allowed {allowed.min():.2e}"
    np.testing.assert_allclose(got.lse2.numpy(), want.lse2.numpy(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize(("dim", "model"), SHAPES)
def test_the_reference_agrees(layout: Layout, dim: int, model: Layout) -> None:
    """On every path, widening the codes to floats included."""
    heads = Heads(6, 2, dim)
    world = make_coded_world(heads, model, pages=24, seed=dim)
    parts = [
        (world.add(layout, coded, tail), rows)
        for coded, tail, rows in [(3, 0, [191, 3, 64]), (4, 100, [355]), (2, 70, [197])]
    ]
    plan = coded_plan(world, parts)
    q = world.tensor(5, heads.q, dim)
    want = ReferenceAttention().attend(q, world.kv, plan)
    for path in available():
        ops = cpu_attention(path, 2)
        near(world, ops.attend(q, world.kv, plan), want)
        assert ops.decode_calls == 0
        widening = decoding_attention(path, 2)
        got = widening.attend(q, world.kv, plan)
        assert widening.decode_calls > 0
        # Operands that are no bytes: theirs round to 1/127 and 1/255.
        top = want.out.abs().max()
        assert (got.out - want.out).abs().max() <= 0.1 * top


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17])
def test_any_number_of_rows(queries: int) -> None:
    heads = Heads(queries, 1, 96)
    world = make_coded_world(heads, Layout.BF16, pages=8)
    plan = coded_plan(world, [(world.add(Layout.K2V2, 2, 65), [192])])
    q = world.tensor(1, queries, 96)
    want = ReferenceAttention().attend(q, world.kv, plan)
    for path in available():
        near(world, cpu_attention(path).attend(q, world.kv, plan), want)


@pytest.mark.parametrize(
    ("model", "layout", "dim", "halves", "near_to"),
    [
        (Layout.F32, Layout.K2V2, 128, False, 1e-5),
        (Layout.F32, Layout.K2V2, 128, True, 1e-5),
        (Layout.BF16, Layout.K8V8, 64, True, 0.01),
        *((Layout.BF16, Layout.K2V2, dim, True, 0.02) for dim in (16, 64, 80, 128, 256)),
        *((Layout.BF16, x, 96, True, 0.02) for x in (Layout.K4V2, Layout.K4V4)),
    ],
)
def test_widened_codes(
    path: CpuKernel, model: Layout, layout: Layout, dim: int, *, halves: bool, near_to: float
) -> None:
    """The baselines equal attention on what the codes stand for."""
    heads = Heads(9, 1, dim)
    world = make_coded_world(heads, model, pages=8)
    context = world.add(layout, 3, 0)
    codes = [page.codes for page in context.coded]
    k = torch.cat([x.k[0] * x.k_scale[0].float() + x.k_min[0].float() for x in codes])
    parts = codes[0].v_scale.shape[1]
    scale, low = (
        torch.cat([y.float().repeat_interleave(dim // parts, 0).T for y in ys])
        for ys in ([x.v_scale[0] for x in codes], [x.v_min[0] for x in codes])
    )
    v = torch.cat([x.v[0] for x in codes]) * scale + low
    assert context.coded[0].sinks is not None
    k[:SINK_TOKENS], v[:SINK_TOKENS] = (x[0].float() for x in context.coded[0].sinks)
    q = world.tensor(1, heads.q, heads.dim)
    ops = decoding_attention(path, 1, halves=halves)
    got = ops.attend(q, world.kv, coded_plan(world, [(context, [191])]))
    exact = attention_oracle(q.float(), k[:, None], v[:, None], np.ones((1, 1, 192), np.bool_))
    error = np.abs(got.out.float().numpy() - exact.out).max()
    assert error < near_to * np.abs(exact.out).max()
    assert ops.decode_calls > 0


def exact_codes(world: CodedWorld, layout: Layout) -> Codes:
    """Return a page whose scales are 1 and mins 0, its value scales integers over 255."""
    codes = random_codes(world.rng, layout, world.heads.kv, world.heads.dim)
    scales = world.rng.integers(0, 256, codes.v_scale.shape)
    scales[..., -1] = 255
    return replace(
        codes,
        k_scale=torch.ones_like(codes.k_scale),
        k_min=torch.zeros_like(codes.k_min),
        v_scale=torch.from_numpy(scales.astype(np.float32)).bfloat16(),
        v_min=torch.zeros_like(codes.v_min),
    )


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_sums_of_integers_are_exact(path: CpuKernel, layout: Layout, dim: int) -> None:
    """A query of integers up to 127 is its own bytes: scores show the sums themselves."""
    world = make_coded_world(Heads(3, 1, dim), Layout.F32, pages=8)
    pages = [exact_codes(world, layout) for _ in range(2)]
    context = world.add(layout, 2, 0, pages)
    q = world.rng.integers(-127, 128, (PAGE_TOKENS, 3, dim))
    q[..., :: partition_channels(dim)] = 127
    masks = np.zeros((2 * PAGE_TOKENS, 2, 1), np.uint64)
    masks[1::2, 1, 0] = np.uint64(1) << np.arange(PAGE_TOKENS, dtype=np.uint64)
    plan = coded_plan(world, [(context, [127])] * PAGE_TOKENS, masks=masks)
    queries = torch.from_numpy(q.astype(np.float32))
    got = cpu_attention(path).attend(queries, world.kv, plan)
    sums = np.einsum("tgd,td->tg", q, pages[1].k[0].numpy().astype(np.int64))
    unit = math.log2(math.e) / math.sqrt(dim)
    assert np.array_equal(np.rint(got.lse2.double().numpy() / unit), sums)


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_sums_of_values_are_exact(path: CpuKernel, layout: Layout, dim: int) -> None:
    """A query of zeros weighs all tokens 1: value scales up to 255 are the weights' bytes."""
    heads = Heads(5, 1, dim)
    world = make_coded_world(heads, Layout.F32, pages=8)
    pages = [exact_codes(world, layout) for _ in range(2)]
    context = world.add(layout, 2, 0, pages)
    masks = np.zeros((2, 2, 1), np.uint64)
    masks[1] = np.uint64(2**64 - 1)
    plan = coded_plan(world, [(context, [127])], masks=masks)
    got = cpu_attention(path).attend(torch.zeros(1, heads.q, dim), world.kv, plan)
    weights = pages[1].v_scale[0].double().numpy().repeat(partition_channels(dim), axis=0).T
    want = (weights * pages[1].v[0].numpy()).sum(axis=0) / PAGE_TOKENS
    for head in range(heads.q):
        np.testing.assert_array_max_ulp(got.out[0, head].numpy(), want.astype(np.float32), maxulp=2)


def test_sinks_are_read_in_16_bits(path: CpuKernel) -> None:
    """With only the sinks alive, the result is theirs; their codes are never looked at."""
    heads = Heads(3, 1, 128)
    world = make_coded_world(heads, Layout.F32, pages=4)
    codes = random_codes(world.rng, Layout.K2V2, 1, 128)
    codes.k[:, :SINK_TOKENS] = 3
    codes.v[:, :SINK_TOKENS] = 3
    context = world.add(Layout.K2V2, 2, 0, [codes, random_codes(world.rng, Layout.K2V2, 1, 128)])
    masks = np.zeros((2, 2, 1), np.uint64)
    masks[0, 1, 0] = 15
    plan = coded_plan(world, [(context, [127])], masks=masks)
    q = world.tensor(1, heads.q, 128)
    got = cpu_attention(path).attend(q, world.kv, plan)
    assert context.coded[0].sinks is not None
    k, v = (x[0].float() for x in context.coded[0].sinks)
    scores = q[0] @ k.T / math.sqrt(128)
    np.testing.assert_allclose(got.out[0], torch.softmax(scores, 1) @ v, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        got.lse2[0], torch.logsumexp(scores, 1) / math.log(2), rtol=0, atol=1e-5
    )


def test_constant_pages_zeros_denormals_and_outliers(path: CpuKernel) -> None:
    heads = Heads(4, 1, 64)
    world = make_coded_world(heads, Layout.F32, pages=8)
    codes = [random_codes(world.rng, Layout.K2V2, 1, 64) for _ in range(4)]
    codes[0] = replace(codes[0], k=codes[0].k * 0, v=codes[0].v * 0)  # constant: mins alone
    codes[1] = replace(codes[1], k_scale=codes[1].k_scale * 0, v_scale=codes[1].v_scale * 0)
    codes[2] = replace(codes[2], k_scale=codes[2].k_scale * 1e-39, v_min=codes[2].v_min * 1e-39)
    codes[3].k_scale[:, 7] = 1e4
    codes[3].v_scale[:, :, 9] = 1e4
    context = world.add(Layout.K2V2, 4, 0, codes)
    q = world.tensor(1, heads.q, 64)
    q[0, 1] = 0
    plan = coded_plan(world, [(context, [255])])
    got = cpu_attention(path).attend(q, world.kv, plan)
    assert got.out.isfinite().all()
    near(world, got, ReferenceAttention().attend(q, world.kv, plan))


def test_masks_hits_and_bytes(path: CpuKernel) -> None:
    heads = Heads(6, 2, 64)
    world = make_coded_world(heads, Layout.F32, pages=12)
    context = world.add(Layout.K4V2, 6, 100)
    rows = [483, 430]
    masks = world.rng.integers(0, 2**64, (len(context.slots), 2, 2), np.uint64)
    masks[2, 1, 0] = 0
    plan = coded_plan(world, [(context, rows)], masks=masks)
    q = world.tensor(2, heads.q, 64)
    observe = Observe(np.array([-7.0, np.inf], np.float32))
    ops, reference = cpu_attention(path), ReferenceAttention()
    got, want = (x.attend(q, world.kv, plan, observe) for x in (ops, reference))
    near(world, got, want)
    assert got.hits is not None
    assert want.hits is not None
    assert got.hits.any()
    differing = np.bitwise_count(got.hits ^ want.hits).sum()  # at the threshold itself
    assert differing <= 2
    sinks = tile_bytes(Layout.K4V2, 64, first=True) - tile_bytes(Layout.K4V2, 64)
    tiles = 11 * tile_bytes(Layout.K4V2, 64) + 2 * sinks + 4 * tile_bytes(Layout.F32, 64)
    assert ops.bytes_read == tiles, "observing takes the scores of attending"


def test_a_tile_whose_sinks_lie_outside_is_refused(path: CpuKernel) -> None:
    heads = Heads(2, 1, 64)
    world = make_coded_world(heads, Layout.F32, pages=4)
    context = world.add(Layout.K2V2, 2, 0)
    plan = coded_plan(world, [(context, [127])])
    q = world.tensor(1, 2, 64)
    end = world.kv.buffer.numel() // world.kv.unit_bytes
    size = tile_bytes(Layout.K2V2, 64, first=True) // world.kv.unit_bytes
    table = world.kv.tile_table
    for excess, refused in ((0, False), (1, True)):
        table[context.slots[0]] = end - size + excess
        world.kv.buffer[(end - size) * 64 :] = 0
        if not refused:
            cpu_attention(path).attend(q, world.kv, plan)
            continue
        with pytest.raises(KernelInputError, match="without a tile"):
            cpu_attention(path).attend(q, world.kv, plan)


@pytest.mark.parametrize("tail", [0, 30])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("layout", [Layout.K2V2, Layout.K8V8])
def test_a_query_that_is_not_finite_shows_in_its_own_row(
    path: CpuKernel, layout: Layout, value: float, tail: int
) -> None:
    """On coded pages alone and where float ones follow: no other row or head changes a bit."""
    heads = Heads(4, 2, 64)
    world = make_coded_world(heads, Layout.BF16, pages=12)
    plan = coded_plan(world, [(world.add(layout, 4, tail), [200 + tail, 201 + tail, 255 + tail])])
    q = world.tensor(3, heads.q, heads.dim)
    want = cpu_attention(path).attend(q, world.kv, plan)
    q[1, 1, 5] = value
    got = cpu_attention(path).attend(q, world.kv, plan)
    assert torch.equal(got.out[[0, 2]], want.out[[0, 2]])
    assert torch.equal(got.out[1, 0], want.out[1, 0])
    assert not bool(torch.isfinite(got.out[1, 1]).all())
