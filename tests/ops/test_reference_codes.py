"""Attention on codes against the product of dequantised operands, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvkeep.errors import KernelInputError
from kvkeep.ops.codes import CODE_BITS, SINK_TOKENS, partition_channels, tile_bytes
from kvkeep.ops.layout import Observe
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.ops.reference_codes import CodedTile, quantise_query, quantise_weights
from kvkeep.types import PAGE_TOKENS, Layout
from tests.coded import UNIT, CodedPage, CodedWorld, Context, coded_plan, make_coded_world
from tests.oracles import Heads

CODED = list(CODE_BITS)
Float64 = NDArray[np.float64]


def operands(page: CodedPage, head: int, q: torch.Tensor) -> tuple[Float64, Float64]:
    """Return the scores [S] of one query row, and the tile's values [S, D] dequantised.

    The row is what its signed bytes stand for, the keys are codes * scale + min.
    """
    codes = page.codes
    dim = len(q)
    scale, low = codes.k_scale[head].double().numpy(), codes.k_min[head].double().numpy()
    keys = codes.k[head].double().numpy() * scale + low
    parts = (dim // partition_channels(dim), -1)
    query = quantise_query((q.float() * codes.k_scale[head].float()).view(parts))
    stands_for = (query.integers * query.scale[:, None]).double().numpy().reshape(dim) / scale
    scores = (keys - low) @ stands_for + low @ q.double().numpy()
    v_scale = codes.v_scale[head].double().numpy().repeat(dim // parts[0], axis=0).T
    v_min = codes.v_min[head].double().numpy().repeat(dim // parts[0], axis=0).T
    values = codes.v[head].double().numpy() * v_scale + v_min
    if page.sinks is not None:
        k, v = (x[head].double().numpy() for x in page.sinks)
        scores[:SINK_TOKENS] = k @ q.double().numpy()
        values[:SINK_TOKENS] = v
    return scores, values


def stands_for_weights(page: CodedPage, head: int, p: Float64) -> Float64:
    """Return what the bytes of weights p [S] stand for, per partition [NP, S]."""
    scale = page.codes.v_scale[head]
    coded = p.copy()
    if page.sinks is not None:
        coded[:SINK_TOKENS] = 0
    weights = quantise_weights(torch.from_numpy(coded).float() * scale.float())
    found = (weights.integers * weights.scale[:, None]).double().numpy()
    return np.asarray(found / scale.double().numpy())


def weighed(page: CodedPage, head: int, p: Float64, values: Float64) -> Float64:
    """Return weights p [S] times values [S, D]: bytes times codes, and exact weights times mins."""
    dim = values.shape[1]
    per = partition_channels(dim)
    stands = stands_for_weights(page, head, p).repeat(per, axis=0).T
    low = page.codes.v_min[head].double().numpy().repeat(per, axis=0).T
    begin = 0 if page.sinks is None else SINK_TOKENS
    coded = slice(begin, None)
    total = p[:begin] @ values[:begin] + p[coded] @ low[coded]
    return np.asarray(total + (stands * (values - low))[coded].sum(axis=0))


def oracle(world: CodedWorld, context: Context, q: torch.Tensor) -> tuple[Float64, Float64]:
    """Return out [Hq, D] and lse2 [Hq] of the row at the context's end."""
    heads = world.heads
    out, lse2 = np.zeros((heads.q, heads.dim)), np.zeros(heads.q)
    log2e = math.log2(math.e) / math.sqrt(heads.dim)
    for row in range(heads.q):
        head = row // (heads.q // heads.kv)
        pages = [operands(page, head, q[row]) for page in context.coded]
        tail_k, tail_v = (x[:, head].double().numpy() for x in (context.k, context.v))
        scores = np.concatenate([s for s, _ in pages] + [tail_k @ q[row].double().numpy()]) * log2e
        top = scores.max()
        lse2[row] = top + np.log2(np.exp2(scores - top).sum())
        p = np.exp2(scores - lse2[row])
        out[row] = p[context.coded_tokens :] @ tail_v
        for i, (page, (_, values)) in enumerate(zip(context.coded, pages, strict=True)):
            own = p[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS]
            out[row] += weighed(page, head, own, values)
    return out, lse2


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("seen", [1, 63, 64])
def test_the_product_of_dequantised_operands(
    layout: Layout, dim: int, first: bool, seen: int
) -> None:
    world = make_coded_world(Heads(3, 1, dim), Layout.F32, pages=2, seed=dim)
    context = world.add(layout, 2, 0)
    page = context.coded[0 if first else 1]
    begin = int(world.kv.tile_table[context.slots[0 if first else 1], world.kv.layer, 0]) * UNIT
    raw = world.kv.buffer[begin : begin + tile_bytes(layout, dim, first=first)]
    tile = CodedTile(raw, layout, dim, torch.float64, first=first)
    q = world.tensor(3, dim)
    p = torch.from_numpy(world.rng.uniform(0, 1, (3, PAGE_TOKENS)))
    p[:, seen:] = 0
    scores, out = tile.scores(q.double()), tile.weigh(p)
    for row in range(3):
        want, values = operands(page, 0, q[row])
        np.testing.assert_allclose(scores[row], want, rtol=0, atol=1e-5 * np.abs(want).max())
        want = weighed(page, 0, p[row].numpy(), values)
        np.testing.assert_allclose(out[row], want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize(("pages", "tail"), [(1, 0), (2, 0), (2, 1), (4, 200)])
def test_whole_contexts(layout: Layout, pages: int, tail: int) -> None:
    heads = Heads(4, 2, 96)
    world = make_coded_world(heads, Layout.F32, pages=10, seed=pages)
    context = world.add(layout, pages, tail)
    q = world.tensor(1, heads.q, heads.dim)
    got = ReferenceAttention().attend(
        q, world.kv, coded_plan(world, [(context, [context.length - 1])])
    )
    out, lse2 = oracle(world, context, q[0])
    np.testing.assert_allclose(got.lse2[0].numpy(), lse2, rtol=1e-5)
    # A weight next to a half rounds either way: one byte of 255, of one token.
    np.testing.assert_allclose(got.out[0].numpy(), out, rtol=0, atol=5e-4 * np.abs(out).max())


def test_quantised_operands() -> None:
    folded = torch.tensor([[0.0, 0.0], [1e-40, 0.0], [-2.0, 1.0], [1e4, 0.5]])
    query = quantise_query(folded)
    assert query.integers.tolist() == [[0, 0], [0, 0], [-127, 64], [127, 0]]  # 63.5 to even
    weights = quantise_weights(folded.abs())
    assert weights.integers.tolist() == [[0, 0], [0, 0], [255, 128], [255, 0]]
    assert torch.equal(weights.scale[2:], torch.tensor([2.0, 1e4]) / 255)
    assert weights.scale[:2].tolist() == [1, 1]


def test_masks_hits_and_bytes() -> None:
    heads = Heads(2, 1, 64)
    world = make_coded_world(heads, Layout.F32, pages=10)
    context = world.add(Layout.K2V2, 2, 100)
    masks = np.full((len(context.slots), 2, 1), 0, np.uint64)
    masks[1, 1, 0] = np.uint64(1 << 9)
    masks[2, 1, 0] = np.uint64(1 << 5)
    plan = coded_plan(world, [(context, [context.length - 1])], masks=masks)
    ops = ReferenceAttention()
    q = world.tensor(1, heads.q, heads.dim)
    got = ops.attend(q, world.kv, plan, Observe(np.array([-200], np.float32)))
    assert got.hits is not None
    assert got.hits[:, 0].tolist() == [0, 1 << 9, 1 << 5, 0]
    sizes = [tile_bytes(Layout.K2V2, 64, first=True), tile_bytes(Layout.K2V2, 64)]
    assert ops.bytes_read == sum(sizes) + 2 * tile_bytes(Layout.F32, 64)


def test_what_is_not_there_is_refused() -> None:
    heads = Heads(2, 1, 64)
    world = make_coded_world(heads, Layout.F32, pages=10)
    context = world.add(Layout.K2V2, 2, 0)
    plan = coded_plan(world, [(context, [127])])
    q = world.tensor(1, heads.q, heads.dim)
    end = world.kv.buffer.numel() // world.kv.unit_bytes
    size = tile_bytes(Layout.K2V2, 64, first=True) // world.kv.unit_bytes
    ops = ReferenceAttention()
    world.kv.tile_table[context.slots[0]] = end - size
    ops.attend(q, world.kv, plan)
    world.kv.tile_table[context.slots[0]] = end - size + 1  # its sinks would lie outside
    with pytest.raises(KernelInputError, match="without a tile"):
        ops.attend(q, world.kv, plan)


def test_a_row_that_is_not_finite_is_nobody_elses_concern() -> None:
    heads = Heads(2, 1, 64)
    world = make_coded_world(heads, Layout.F32, pages=10)
    context = world.add(Layout.K2V2, 2, 0)
    q = world.tensor(2, heads.q, heads.dim)
    plan = coded_plan(world, [(context, [126, 127])])
    expected = ReferenceAttention().attend(q, world.kv, plan)
    q[0] = np.inf
    got = ReferenceAttention().attend(q, world.kv, plan)
    assert torch.equal(got.out[1], expected.out[1])
    assert torch.equal(got.lse2[1], expected.lse2[1])
