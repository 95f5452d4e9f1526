"""Triton kernels over coded tiles (`ops/codes.py`): the node stage and observing, on the codes.

Imported by `ops/triton_attention.py` alone. A program's rows share one unpacking: (query, head in
group), as for float tiles. The integers are those of `ops/reference_codes.py`: queries folded with
`k_scale` become signed bytes, weights folded with `v_scale` unsigned ones. Matrix units multiply
signed bytes only, so an unsigned byte x goes in as x - 128 and 128 times the sum of its partner
comes on top: in 32-bit integers, exactly. Nothing may be contracted into a fused multiply-add where
bytes are rounded: launch with `enable_fp_fusion=False`.

Codes come out of their bytes field by field, so that tokens and channels stand in `spread` order
while they are multiplied; outputs stand in their own. Channels are taken partition by partition,
each padded to `BLOCK` columns. `halves` is the buffer `tiles` in units of two bytes, for bfloat16.
With `WIDEN` codes become floats first, which is the baseline that others use.
"""

import triton
import triton.language as tl

from kvkeep.ops.codes import CODE_BITS, coded_tile_bytes, partition_channels
from kvkeep.ops.triton_kernels import (
    TASK_FIELDS,
    VISIT_FIELDS,
    find_rows,
    find_targets,
    find_tile,
    latest_of,
    least_scores,
    load_channels,
    store_channels,
    total_of,
    word_of,
)
from kvkeep.types import Layout

SINKS = tl.constexpr(4)
"""`SINK_TOKENS` of `ops/codes.py`."""

LEAST = tl.constexpr(2.0**-100)
"""As in `ops/reference_codes.py`."""

EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away again, it leaves the nearest integer, ties to even."""


LEAST_COLUMNS = 32
"""Of a product of bytes on matrix units."""


def coded_arguments(
    layout: Layout, dim: int, unit_bytes: int, *, decode: bool
) -> dict[str, int | bool]:
    """Return what the kernels are told of a layout, by its name there."""
    bits, channels = CODE_BITS[layout], partition_channels(dim)
    return {
        "UNIT": unit_bytes,
        "NP": dim // channels,
        "KP": channels,
        "BLOCK": max(LEAST_COLUMNS, 1 << (channels - 1).bit_length()),
        "K_BITS": bits.k,
        "V_BITS": bits.v,
        "SINK_BYTE": coded_tile_bytes(layout, dim),
        "WIDEN": decode,
    }


@triton.jit
def spread(n: tl.constexpr, F: tl.constexpr):
    """Return what stands at each of n places where fields of F codes a byte were taken apart."""
    c = tl.arange(0, n)
    return (c // (4 * F)) * (4 * F) + (c % F) * 4 + (c // F) % 4


@triton.jit
def unpack(raw, BITS: tl.constexpr):
    """Return codes [X, N * 8 / BITS] of bytes [X, N] in `spread` order; of 8 bits less 128."""
    if BITS == 8:
        return (raw ^ 128).to(tl.int8, bitcast=True)
    else:
        if BITS == 4:
            fields = tl.join(raw & 15, raw >> 4)
        else:
            even = tl.join(raw & 3, (raw >> 4) & 3)
            fields = tl.join(even, tl.join((raw >> 2) & 3, raw >> 6))
        return tl.reshape(fields, (raw.shape[0], raw.shape[1] * (8 // BITS))).to(tl.int8)


@triton.jit
def load_bfloats(at, inside):
    """Return bfloat16 numbers as float32: their bits moved, which any machine can."""
    raw = tl.load(at, mask=inside, other=0)
    return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def key_codes(
    keys, h, t, live,
    D: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Return partition h of a tile's keys [tokens t, BLOCK], channels in `spread` order."""
    F: tl.constexpr = 8 // BITS
    n = tl.arange(0, BLOCK // F)
    line = (t // 16)[:, None] * (D // (4 * F)) + (h * (KP // (4 * F)) + n // 4)[None, :]
    at = line * 64 + (t % 16)[:, None] * 4 + (n % 4)[None, :]
    inside = (t >= 0)[:, None] & ((n < KP // F) & live)[None, :]
    return unpack(tl.load(keys + at, mask=inside, other=0), BITS)


@triton.jit
def value_codes(
    values, h, live,
    S: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Return partition h of a tile's values [BLOCK channels, S], tokens in `spread` order."""
    F: tl.constexpr = 8 // BITS
    n = tl.arange(0, S // F)
    d = tl.arange(0, BLOCK)
    line = (n // 4)[None, :] * (D // 16) + (h * (KP // 16) + d // 16)[:, None]
    at = line * 64 + (d % 16)[:, None] * 4 + (n % 4)[None, :]
    inside = ((d < KP) & live)[:, None] & (n >= 0)[None, :]
    return unpack(tl.load(values + at, mask=inside, other=0), BITS)


@triton.jit
def nearest(folded, TOP: tl.constexpr):
    """Return rows [R, N] as integers up to TOP, float32, and the scale of each row."""
    largest = tl.max(tl.abs(folded), 1)
    usable = largest >= LEAST
    held = tl.where(usable, largest, 1.0)
    factor = tl.where(usable, tl.div_rn(tl.full(held.shape, TOP, tl.float32), held), 0.0)
    scale = tl.where(usable, tl.div_rn(held, tl.full(held.shape, TOP, tl.float32)), 1.0)
    return (folded * factor[:, None] + EVEN) - EVEN, scale


@triton.jit
def multiply_keys(signed, codes, BITS: tl.constexpr):
    """Return int32 sums [R, tokens] of signed bytes [R, BLOCK] times key codes."""
    sums = tl.dot(signed, tl.trans(codes), out_dtype=tl.int32)
    if BITS == 8:
        sums += 128 * tl.sum(signed.to(tl.int32), 1)[:, None]
    return sums


@triton.jit
def multiply_values(shifted, codes, S: tl.constexpr, BITS: tl.constexpr):
    """Return int32 sums [R, BLOCK] of weights' bytes, less 128, times value codes."""
    sums = tl.dot(shifted, tl.trans(codes), out_dtype=tl.int32)
    sums += 128 * tl.sum(codes.to(tl.int32), 1)[None, :]
    if BITS == 8:
        sums += 128 * (tl.sum(shifted.to(tl.int32), 1) + 128 * S)[:, None]
    return sums


@triton.jit
def score_codes(
    queries, codes_at, halves_at, seen, live, first, at, t, scale,
    S: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    K_BITS: tl.constexpr, SINK_BYTE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return scores [R, tokens t] in base 2, -inf where a row does not see a token."""
    d = spread(BLOCK, 8 // K_BITS)
    inside = (d < KP) & live
    scores = tl.zeros((at.shape[0], S), tl.float32)
    for h in tl.static_range(NP):
        own = queries[h].to(tl.float32)
        scale_at = halves_at + (S * D * K_BITS // 16 + h * KP) + d
        k_scale, k_min = load_bfloats(scale_at, inside), load_bfloats(scale_at + D, inside)
        codes = key_codes(codes_at, h, t, live, D, KP, BLOCK, K_BITS)
        if WIDEN:
            keys = (codes.to(tl.float32) + (128 if K_BITS == 8 else 0)) * k_scale[None, :]
            keys = (keys + k_min[None, :]).to(queries[h].dtype)
            scores += tl.dot(queries[h], tl.trans(keys), input_precision="ieee")
        else:
            signed, size = nearest(own * k_scale[None, :], 127.0)
            sums = multiply_keys(signed.to(tl.int8), codes, K_BITS)
            scores += sums.to(tl.float32) * size[:, None]
            scores += tl.sum(own * k_min[None, :], 1)[:, None]
    if first == 0:
        for i in tl.static_range(SINKS):
            exact = tl.zeros((at.shape[0],), tl.float32)
            for h in tl.static_range(NP):
                sink = load_bfloats(halves_at + (SINK_BYTE // 2 + i * D + h * KP) + d, inside)
                exact += tl.sum(queries[h].to(tl.float32) * sink[None, :], 1)
            scores = tl.where((t == i)[None, :], exact[:, None], scores)
    visible = seen[None, :] & ((first + t)[None, :] <= at[:, None])
    return tl.where(visible, scores * scale, float("-inf"))


@triton.jit
def weigh_codes(
    weights, codes_at, halves_at, live, first, t, h, ELEMENT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINK_BYTE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return weights [R, tokens t] times partition h of the values [R, BLOCK]."""
    BEGIN: tl.constexpr = S * D * K_BITS // 8 + 4 * D
    codes = value_codes(codes_at + BEGIN, h, live, S, D, KP, BLOCK, V_BITS)
    scale_at = halves_at + ((BEGIN + S * D * V_BITS // 8) // 2 + h * S) + t
    there = (t >= 0) & live
    v_scale, v_min = load_bfloats(scale_at, there), load_bfloats(scale_at + NP * S, there)
    coded = tl.where(((first + t) < SINKS)[None, :], 0.0, weights)
    if WIDEN:
        values = (codes.to(tl.float32) + (128 if V_BITS == 8 else 0)) * v_scale[None, :]
        values = tl.trans((values + v_min[None, :]).to(ELEMENT))
        product = tl.dot(coded.to(ELEMENT), values, input_precision="ieee")
    else:
        top, size = nearest(coded * v_scale[None, :], 255.0)
        sums = multiply_values((top - 128.0).to(tl.int8), codes, S, V_BITS)
        product = sums.to(tl.float32) * size[:, None]
        product += tl.sum(coded * v_min[None, :], 1)[:, None]
    if first == 0:
        d = tl.arange(0, BLOCK)
        for i in tl.static_range(SINKS):
            weight = tl.sum(tl.where((t == i)[None, :], weights, 0.0), 1)
            sink_at = halves_at + (SINK_BYTE // 2 + (SINKS + i) * D + h * KP) + d
            product += weight[:, None] * load_bfloats(sink_at, (d < KP) & live)[None, :]
    return product


@triton.jit
def grown(some, more):
    """Return a tuple with one more member."""
    return some + (more,)


@triton.jit
def load_queries(
    q, q_token, q_head, row, q_heads, used,
    NP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, K_BITS: tl.constexpr,
):  # fmt: skip
    """Return a task's queries, one [ROWS, BLOCK] per partition, channels in `spread` order."""
    d = spread(BLOCK, 8 // K_BITS)
    queries = ()
    for h in tl.static_range(NP):
        own = load_channels(q, q_token, q_head, row, q_heads, used, h * KP + d, d < KP)
        queries = grown(queries, own)
    return queries


@triton.jit(do_not_specialize=["layer"])
def coded_node_kernel(
    tiles, halves, table, tasks, visits, targets, order, positions, pages, private, masks,
    q, out, lse2, part_out, part_lse2,
    q_token, q_head, layer, num_layers, num_kv_heads, scale,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    NP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINK_BYTE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, HAS_PRIVATE: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """Attend a task's rows over its coded tiles; stores as `triton_kernels.node_kernel` does."""
    task = tasks + tl.program_id(0) * TASK_FIELDS
    head = tl.program_id(1)
    if tl.load(task + 1) == 0:
        return
    row, q_heads, used, at = find_rows(task, order, positions, head, G, ROWS)
    queries = load_queries(q, q_token, q_head, row, q_heads, used, NP, KP, BLOCK, K_BITS)
    top = tl.max(at, 0)
    t = spread(S, 8 // V_BITS)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = ()
    for _ in tl.static_range(NP):
        acc = grown(acc, tl.zeros((ROWS, BLOCK), tl.float32))
    visit = visits + tl.load(task + 2) * VISIT_FIELDS
    for i in range(tl.load(task + 3)):
        tile, first, seen = find_tile(
            visit + i * VISIT_FIELDS, top, t, head, pages, table, private, masks,
            layer, num_layers, num_kv_heads, HAS_PRIVATE, HAS_MASKS,
        )  # fmt: skip
        live = tl.max(seen.to(tl.int32), 0) > 0
        codes_at, halves_at = tiles + tile * UNIT, halves + tile * (UNIT // 2)
        scores = score_codes(
            queries, codes_at, halves_at, seen, live, first, at, t, scale,
            S, D, NP, KP, BLOCK, K_BITS, SINK_BYTE, WIDEN,
        )  # fmt: skip
        new_m = tl.maximum(m, tl.max(scores, 1))
        held = tl.where(new_m == float("-inf"), 0.0, new_m)
        weights = tl.exp2(scores - held[:, None])
        carried = tl.exp2(m - held)
        l = l * carried + tl.sum(weights, 1)
        new_acc = ()
        for h in tl.static_range(NP):
            product = weigh_codes(
                weights, codes_at, halves_at, live, first, t, h, q.dtype.element_ty,
                S, D, NP, KP, BLOCK, K_BITS, V_BITS, SINK_BYTE, WIDEN,
            )  # fmt: skip
            new_acc = grown(new_acc, acc[h] * carried[:, None] + product)
        acc = new_acc
        m = new_m
    safe, total = total_of(m, l)
    whole, at_out, part, at_part = find_targets(
        task, targets, row, q_heads, used, num_kv_heads * G, G, ROWS
    )
    tl.store(lse2 + at_out, total, mask=whole)
    tl.store(part_lse2 + at_part, total, mask=part)
    d = tl.arange(0, BLOCK)
    for h in tl.static_range(NP):
        result = acc[h] / safe[:, None]
        store_channels(out, part_out, result, whole, at_out, part, at_part, h * KP + d, d < KP, D)


@triton.jit(do_not_specialize=["layer"])
def coded_observe_kernel(
    tiles, halves, table, tasks, visits, order, positions, pages, private, masks,
    q, lse2, thresholds, words, stamps,
    q_token, q_head, layer, num_layers, num_kv_heads, scale,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    NP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINK_BYTE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, HAS_PRIVATE: tl.constexpr, HAS_MASKS: tl.constexpr, STAMPS: tl.constexpr,
):  # fmt: skip
    """Write the words of coded visits, as `triton_kernels.observe_kernel` does."""
    task = tasks + tl.program_id(0) * TASK_FIELDS
    head = tl.program_id(1)
    if tl.load(task + 1) == 0:
        return
    row, q_heads, used, at = find_rows(task, order, positions, head, G, ROWS)
    queries = load_queries(q, q_token, q_head, row, q_heads, used, NP, KP, BLOCK, K_BITS)
    top = tl.max(at, 0)
    t = spread(S, 8 // V_BITS)
    least = least_scores(lse2, thresholds, row, q_heads, used, num_kv_heads * G)
    begin = tl.load(task + 2).to(tl.int64)
    for i in range(tl.load(task + 3)):
        tile, first, seen = find_tile(
            visits + (begin + i) * VISIT_FIELDS, top, t, head, pages, table, private, masks,
            layer, num_layers, num_kv_heads, HAS_PRIVATE, HAS_MASKS,
        )  # fmt: skip
        live = tl.max(seen.to(tl.int32), 0) > 0
        codes_at, halves_at = tiles + tile * UNIT, halves + tile * (UNIT // 2)
        scores = score_codes(
            queries, codes_at, halves_at, seen, live, first, at, t, scale,
            S, D, NP, KP, BLOCK, K_BITS, SINK_BYTE, WIDEN,
        )  # fmt: skip
        found = (begin + i) * num_kv_heads + head
        tl.store(words + found, word_of(scores, least, t))
        if STAMPS:
            tl.store(stamps + found * S + t, latest_of(scores, least, at))
