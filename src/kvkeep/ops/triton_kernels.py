"""Triton kernels over tiles of plain rows: append, the node stage, observing, and the merge.

Imported by `ops/triton_attention.py` alone, and only where Triton is there. A program of the node
stage handles one (task, KV head): its rows are (query, head in group), padded to `ROWS`. A task
without rows ends at once, so that a launch's grid need not follow the plan. Pointers are torch
tensors; strides, offsets and `UNIT`, what tile ids count, are elements. Under
`TRITON_INTERPRET=1` the same source runs on a CPU.

State of a row: m = max s, l = sum 2^(s-m), acc = sum 2^(s-m) v over scores s in base 2; nothing
subtracts -inf from -inf.
"""

import triton
import triton.language as tl

TASK_FIELDS = tl.constexpr(8)
"""Columns of a task (`ops/tasks.py`); a power of two keeps every task aligned."""

VISIT_FIELDS = tl.constexpr(2)
"""Columns of a visit: page entry, position of its first token."""


@triton.jit(do_not_specialize=["layer", "count"])
def append_kernel(
    tiles, table, slots, k, v, count,
    k_token, k_head, v_token, v_head, layer, num_layers, num_kv_heads,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write K and V rows of one KV head where their slots say; -1 writes nothing."""
    head = tl.program_id(1)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    slot = tl.load(slots + token, mask=token < count, other=-1)
    written = slot >= 0
    page = (slot // S).to(tl.int64)
    column = layer * num_kv_heads + head
    tile = tl.load(table + page * (num_layers * num_kv_heads) + column, mask=written, other=0)
    d = tl.arange(0, BLOCK_D)
    inside = written[:, None] & (d < D)[None, :]
    base = tile.to(tl.int64) * UNIT + (slot % S) * D
    to = tiles + base[:, None] + d[None, :]
    keys = tl.load(k + (token * k_token + head * k_head)[:, None] + d[None, :], mask=inside)
    tl.store(to, keys, mask=inside)
    values = tl.load(v + (token * v_token + head * v_head)[:, None] + d[None, :], mask=inside)
    tl.store(to + S * D, values, mask=inside)


@triton.jit
def find_rows(
    task, order, positions, head,
    G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return a task's rows: query row, query head, whether used, position."""
    r = tl.arange(0, ROWS)
    used = r < tl.load(task + 1) * G
    row = tl.load(order + tl.load(task) + r // G, mask=used, other=0).to(tl.int64)
    at = tl.load(positions + row, mask=used, other=-1)
    return row, head * G + r % G, used, at


@triton.jit
def load_channels(q, q_token, q_head, row, q_heads, used, d, inside):  # fmt: skip
    """Return channels d of a task's queries, zeros where not `inside`."""
    where = q + row[:, None] * q_token + (q_heads * q_head)[:, None] + d[None, :]
    return tl.load(where, mask=used[:, None] & inside[None, :], other=0.0)


@triton.jit
def total_of(m, l):
    """Return what a state's sums are divided by, and its log-sum-exp."""
    safe = tl.where(l == 0.0, 1.0, l)
    return safe, tl.where(l == 0.0, float("-inf"), m + tl.log2(safe))


@triton.jit
def find_targets(task, targets, row, q_heads, used, heads, G: tl.constexpr, ROWS: tl.constexpr):
    """Return where rows are stored: in the result if `whole`, in a part if `part`."""
    r = tl.arange(0, ROWS)
    target = tl.load(targets + tl.load(task + 4) + r // G, mask=used, other=-1).to(tl.int64)
    whole = used & (target < 0)
    part = used & (target >= 0)
    return whole, row * heads + q_heads, part, target * heads + q_heads


@triton.jit
def store_channels(
    out, part_out, result, whole, at_out, part, at_part, d, inside, D: tl.constexpr
):  # fmt: skip
    """Store channels d of rows, rounded in the result and as they are in parts."""
    wide = whole[:, None] & inside[None, :]
    where = out + at_out[:, None] * D + d[None, :]
    tl.store(where, result.to(out.dtype.element_ty), mask=wide)
    wide = part[:, None] & inside[None, :]
    tl.store(part_out + at_part[:, None] * D + d[None, :], result, mask=wide)


@triton.jit
def least_scores(lse2, thresholds, row, q_heads, used, heads):
    """Return the score from which on a token gets 2^threshold of its row's weight."""
    total = tl.load(lse2 + row * heads + q_heads, mask=used, other=0.0)
    bound = tl.load(thresholds + row * heads + q_heads, mask=used, other=float("inf"))
    return tl.where(total == float("-inf"), 0.0, total) + bound


@triton.jit
def word_of(scores, least, t):
    """Return the bits of tokens t that some row scores at least so."""
    hit = tl.max((scores >= least[:, None]).to(tl.int32), 0)
    return tl.sum(tl.where(hit > 0, tl.full(t.shape, 1, tl.int64) << t.to(tl.int64), 0), 0)


@triton.jit
def latest_of(scores, least, at):
    """Return the highest position of a row that scores a token at least so, -1 for none."""
    return tl.max(tl.where(scores >= least[:, None], at[:, None], -1), 0)


@triton.jit
def find_tile(
    visit, top, t, head, pages, table, private, masks, layer, num_layers, num_kv_heads,
    HAS_PRIVATE: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """Return a visit's tile, its first position, and which of its tokens t some row may see."""
    entry = tl.load(visit).to(tl.int64)
    first = tl.load(visit + 1)
    column = layer * num_kv_heads + head
    columns = num_layers * num_kv_heads
    seen = first + t <= top
    if HAS_MASKS:
        live = tl.load(masks + entry * columns + column)
        seen = seen & (((live >> t.to(tl.int64)) & 1) != 0)
    page = tl.load(pages + entry).to(tl.int64)
    tile = tl.load(table + page * columns + column, mask=page >= 0, other=0)
    if HAS_PRIVATE:
        own = tl.load(private + (-1 - page) * columns + column, mask=page < 0, other=0)
        tile = tl.where(page >= 0, tile, own)
    return tile.to(tl.int64), first, seen


@triton.jit
def score_tile(
    queries, tiles, tile, seen, first, at, scale,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Return scores [ROWS, S] in base 2, -inf where a row does not see a token."""
    t = tl.arange(0, S)
    d = tl.arange(0, BLOCK_D)
    where = tiles + tile * UNIT + t[:, None] * D + d[None, :]
    keys = tl.load(where, mask=seen[:, None] & (d < D)[None, :], other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    visible = seen[None, :] & ((first + t)[None, :] <= at[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=["layer"])
def node_kernel(
    tiles, table, tasks, visits, targets, order, positions, pages, private, masks,
    q, out, lse2, part_out, part_lse2,
    q_token, q_head, layer, num_layers, num_kv_heads, scale,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, HAS_PRIVATE: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """Attend a task's rows over its tiles; store results, or float32 partials where rows merge."""
    task = tasks + tl.program_id(0) * TASK_FIELDS
    head = tl.program_id(1)
    if tl.load(task + 1) == 0:
        return
    row, q_heads, used, at = find_rows(task, order, positions, head, G, ROWS)
    d = tl.arange(0, BLOCK_D)
    queries = load_channels(q, q_token, q_head, row, q_heads, used, d, d < D)
    top = tl.max(at, 0)
    t = tl.arange(0, S)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    visit = visits + tl.load(task + 2) * VISIT_FIELDS
    for i in range(tl.load(task + 3)):
        tile, first, seen = find_tile(
            visit + i * VISIT_FIELDS, top, t, head, pages, table, private, masks,
            layer, num_layers, num_kv_heads, HAS_PRIVATE, HAS_MASKS,
        )  # fmt: skip
        scores = score_tile(queries, tiles, tile, seen, first, at, scale, S, D, BLOCK_D, UNIT)
        new_m = tl.maximum(m, tl.max(scores, 1))
        held = tl.where(new_m == float("-inf"), 0.0, new_m)
        weights = tl.exp2(scores - held[:, None])
        carried = tl.exp2(m - held)
        where = tiles + tile * UNIT + S * D + t[:, None] * D + d[None, :]
        values = tl.load(where, mask=seen[:, None] & (d < D)[None, :], other=0.0)
        l = l * carried + tl.sum(weights, 1)
        product = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        acc = acc * carried[:, None] + product
        m = new_m
    safe, total = total_of(m, l)
    whole, at_out, part, at_part = find_targets(
        task, targets, row, q_heads, used, num_kv_heads * G, G, ROWS
    )
    tl.store(lse2 + at_out, total, mask=whole)
    tl.store(part_lse2 + at_part, total, mask=part)
    result = acc / safe[:, None]
    store_channels(out, part_out, result, whole, at_out, part, at_part, d, d < D, D)


@triton.jit(do_not_specialize=["layer"])
def observe_kernel(
    tiles, table, tasks, visits, order, positions, pages, private, masks,
    q, lse2, thresholds, words, stamps,
    q_token, q_head, layer, num_layers, num_kv_heads, scale,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, HAS_PRIVATE: tl.constexpr, HAS_MASKS: tl.constexpr, STAMPS: tl.constexpr,
):  # fmt: skip
    """Write one word per (visit, KV head): the tokens some row gave 2^threshold of its weight.

    With STAMPS, the highest position of such a row beside each token, -1 where there is none.
    """
    task = tasks + tl.program_id(0) * TASK_FIELDS
    head = tl.program_id(1)
    if tl.load(task + 1) == 0:
        return
    row, q_heads, used, at = find_rows(task, order, positions, head, G, ROWS)
    d = tl.arange(0, BLOCK_D)
    queries = load_channels(q, q_token, q_head, row, q_heads, used, d, d < D)
    top = tl.max(at, 0)
    t = tl.arange(0, S)
    least = least_scores(lse2, thresholds, row, q_heads, used, num_kv_heads * G)
    begin = tl.load(task + 2).to(tl.int64)
    for i in range(tl.load(task + 3)):
        tile, first, seen = find_tile(
            visits + (begin + i) * VISIT_FIELDS, top, t, head, pages, table, private, masks,
            layer, num_layers, num_kv_heads, HAS_PRIVATE, HAS_MASKS,
        )  # fmt: skip
        scores = score_tile(queries, tiles, tile, seen, first, at, scale, S, D, BLOCK_D, UNIT)
        found = (begin + i) * num_kv_heads + head
        tl.store(words + found, word_of(scores, least, t))
        if STAMPS:
            tl.store(stamps + found * S + t, latest_of(scores, least, at))


@triton.jit
def merge_kernel(
    part_out, part_lse2, rows, bounds, slots, out, lse2, num_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the parts of one (row, head), first to last; empty ones are skipped."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows + index).to(tl.int64)
    if row < 0:
        return
    d = tl.arange(0, BLOCK_D)
    m = tl.full((1,), float("-inf"), tl.float32)
    l = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(tl.load(bounds + index), tl.load(bounds + index + 1)):
        part = tl.load(slots + i).to(tl.int64) * num_heads + head
        part_total = tl.load(part_lse2 + part)
        if part_total != float("-inf"):  # what is not a number stays so
            new_m = tl.maximum(m, part_total)
            carried = tl.exp2(m - new_m)
            weight = tl.exp2(part_total - new_m)
            values = tl.load(part_out + part * D + d, mask=d < D, other=0.0)
            acc = acc * carried + values.to(tl.float32) * weight
            l = l * carried + weight
            m = new_m
    safe, total = total_of(m, l)
    at = row * num_heads + head
    tl.store(lse2 + at + tl.arange(0, 1), total)
    tl.store(out + at * D + d, (acc / safe).to(out.dtype.element_ty), mask=d < D)
