"""Reference attention: slow, obvious and free of kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.checks import (
    check_forest,
    check_pool,
    check_states,
    coded_layouts,
    validate,
)
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.layout import (
    CARRIED,
    LANE_LAYOUTS,
    SPAN_TOKENS,
    TORCH_DTYPE,
    Attended,
    AttentionPlan,
    LayerKV,
    Observe,
    Run,
    chains,
)
from kvkeep.ops.reference_codes import CodedTile
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout, UInt64Array

_GROUP_TOKENS = 16
_PAIR = {Layout.F32: 1, Layout.BF16: 2}


class ReferenceAttention:
    """`AttentionOps` in plain torch; every row is computed alone, in `compute` precision."""

    def __init__(self, compute: torch.dtype = torch.float64) -> None:
        self._compute = compute
        self.calls = 0
        """Number of `attend` calls so far."""
        self.bytes_read = 0
        """Bytes of K and V that `attend` has read so far."""

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Write k, v [T, Hkv, D] at `slots` [T] = page slot * S + row; -1 skips a row."""
        layout = _layout_of(k.dtype)
        for i, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            page, row = divmod(slot, PAGE_TOKENS)
            for head in range(kv.num_kv_heads):
                keys, values = _tile(kv, layout, int(kv.tile_table[page, kv.layer, head]))
                keys[row // _GROUP_TOKENS, :, row % _GROUP_TOKENS, :] = k[i, head].view(
                    -1, _PAIR[layout]
                )
                values[row // _PAIR[layout], :, row % _PAIR[layout]] = v[i, head]

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Attend q [T, Hq, D] over the plan's runs; see `AttentionOps.attend`."""
        return self._attend(q, kv, plan, observe, q.dtype)

    def _attend(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        observe: Observe | None,
        dtype: torch.dtype,
    ) -> Attended:
        self.calls += 1
        validate(q, kv, plan)
        check_forest(plan)
        layout = _layout_of(q.dtype)
        for stored in (layout, *coded_layouts(kv, plan, layout)):
            check_pool(kv, stored)
        out = torch.zeros(q.shape, dtype=dtype)
        lse2 = torch.full(q.shape[:2], -math.inf)
        hits = stamps = None
        least = torch.zeros(0)
        if observe is not None:
            least = torch.from_numpy(observe.by_query_head(*q.shape[:2]))
            hits = np.zeros((len(plan.pages), kv.num_kv_heads), np.uint64)
            stamps = np.full((*hits.shape, PAGE_TOKENS), -1, np.int32) if observe.stamps else None
        for rows, runs in chains(plan):
            tokens = _GroupTokens(kv, plan, runs, layout, self._compute)
            self.bytes_read += tokens.bytes
            for row in rows:
                weights2 = self._row(
                    q[row], tokens, int(plan.row_positions[row]), out[row], lse2[row]
                )
                if observe is not None and hits is not None:
                    seen = weights2 >= least[row].view(*weights2.shape[:2], 1)
                    tokens.mark(hits, seen.any(dim=1))
                    if stamps is not None:
                        tokens.stamp(stamps, seen.any(dim=1), int(plan.row_positions[row]))
        return Attended(out, lse2, hits, stamps)

    def attend_part(self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> torch.Tensor:
        """Return states [2, T, Hq, D + 2] as `m = lse2`, `l = 1`, `O = out`; see `PartOps`."""
        (runs,) = [runs for _, runs in chains(plan)]
        end = max(run.first_position + run.page_count * PAGE_TOKENS for run in runs)
        whole = end // SPAN_TOKENS * SPAN_TOKENS
        return torch.stack(
            [
                _states(self._attend(q, kv, _tokens_of(plan, begin, last), None, torch.float32))
                for begin, last in ((0, whole), (whole, end))
            ]
        )

    def attend_after(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        states: torch.Tensor,
        observe: Observe | None = None,
    ) -> Attended:
        """Attend what is here and merge it with the states; see `PartOps.attend_after`."""
        check_states(q, plan, states)
        here = self._attend(q, kv, plan, observe, torch.float32)
        lse2s = states[..., 0] + torch.log2(states[..., 1])
        outs = states[..., 2:] / states[..., 1:2]
        merged = self.merge(
            torch.cat([outs.nan_to_num(), here.out[None]]),
            torch.cat([torch.where(states[..., 0].isinf(), -math.inf, lse2s), here.lse2[None]]),
        )
        out, lse2 = here.out.to(q.dtype), here.lse2.clone()
        groups = np.asarray(plan.groups)[np.asarray(plan.parents) == CARRIED]
        places = [place for begin, end in groups[:, :2].tolist() for place in range(begin, end)]
        rows = places if plan.row_order is None else plan.row_order[places].tolist()
        out[rows], lse2[rows] = merged[0][rows].to(q.dtype), merged[1][rows]
        return Attended(out, lse2, here.hits, here.stamps)

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge parts [N, T, Hq, D] and [N, T, Hq]; a part with lse2 = -inf is empty."""
        top = lse2s.to(self._compute).amax(dim=0)
        held = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        total = torch.zeros(outs.shape[1:], dtype=self._compute)
        weight_sum = torch.zeros_like(held)
        for out, lse2 in zip(outs, lse2s, strict=True):
            weight = torch.exp2(lse2.to(self._compute) - held)
            total += weight[..., None] * out.to(self._compute)
            weight_sum += weight
        empty = weight_sum == 0
        safe = torch.where(empty, torch.ones_like(weight_sum), weight_sum)
        lse2 = torch.where(empty, torch.full_like(held, -math.inf), held + torch.log2(safe))
        return (total / safe[..., None]).to(outs.dtype), lse2.float()

    def _row(
        self,
        q: torch.Tensor,
        tokens: _GroupTokens,
        position: int,
        out: torch.Tensor,
        lse2: torch.Tensor,
    ) -> torch.Tensor:
        """Fill one row's out [Hq, D] and lse2 [Hq]; return log2 weights [Hkv, G, n]."""
        heads, dim = q.shape
        num_kv_heads = tokens.k.shape[0]
        grouped = q.to(self._compute).view(num_kv_heads, heads // num_kv_heads, dim)
        count = int((tokens.positions <= position).sum())
        live = tokens.live[:, :count]
        scores = tokens.scores(grouped)[..., :count] * (math.log2(math.e) / dim**0.5)
        scores = torch.where(live[:, None, :], scores, -math.inf)
        if count == 0:
            return scores
        total = torch.logsumexp(scores * math.log(2), dim=-1) / math.log(2)
        held = torch.where(torch.isinf(total), torch.zeros_like(total), total)
        weights2: torch.Tensor = scores - held[..., None]
        out.copy_(tokens.weigh(torch.exp2(weights2)).view(heads, dim))
        lse2.copy_(total.view(heads))
        return weights2


class _GroupTokens:
    """The tokens of a group's runs: float k, v [Hkv, n, D], live [Hkv, n], positions [n].

    Tokens of coded pages are zeros in k and v, and `coded` holds them by (KV head, entry's place).
    """

    def __init__(
        self,
        kv: LayerKV,
        plan: AttentionPlan,
        runs: list[Run],
        layout: Layout,
        compute: torch.dtype,
    ) -> None:
        places = [(run, i) for run in runs for i in range(run.page_count)]
        self.entries = [run.page_begin + i for run, i in places]
        starts = [run.first_position + i * PAGE_TOKENS for run, i in places]
        heads, count = kv.num_kv_heads, len(self.entries) * PAGE_TOKENS
        self.positions = torch.tensor(
            [start + row for start in starts for row in range(PAGE_TOKENS)], dtype=torch.int64
        )
        self.k = torch.zeros((heads, count, kv.head_dim), dtype=compute)
        self.v = torch.zeros_like(self.k)
        self.live = torch.zeros((heads, count), dtype=torch.bool)
        self.coded: dict[tuple[int, int], CodedTile] = {}
        self.bytes = 0
        for i, (entry, (run, _)) in enumerate(zip(self.entries, places, strict=True)):
            first = starts[i] == 0
            rows = _rows(i)
            for head in range(heads):
                stored = kv.layout_of(run.layout, head)
                self.bytes += tile_bytes(stored, kv.head_dim, first=first)
                self.live[head, rows] = _live(kv, plan, entry, head)
                if not self.live[head, rows].any():
                    continue
                tile = _tile_id(kv, plan, entry, head)
                if stored != layout:
                    raw = _raw_tile(kv, stored, tile, first=first)
                    self.coded[head, i] = CodedTile(raw, stored, kv.head_dim, compute, first=first)
                    continue
                keys, values = _tile(kv, layout, tile)
                self.k[head, rows] = keys.permute(0, 2, 1, 3).reshape(PAGE_TOKENS, -1).to(compute)
                values = values.permute(0, 2, 1).reshape(PAGE_TOKENS, -1).to(compute)
                self.v[head, rows] = values

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """Return q [Hkv, G, D] times the keys [Hkv, G, n]."""
        scores = torch.einsum("hgd,htd->hgt", q, self.k)
        for (head, i), tile in self.coded.items():
            scores[head, :, _rows(i)] = tile.scores(q[head])
        return scores

    def weigh(self, p: torch.Tensor) -> torch.Tensor:
        """Return p [Hkv, G, n or fewer] times the values [Hkv, G, D]."""
        count = p.shape[2]
        out = torch.einsum("hgt,htd->hgd", p, self.v[:, :count])
        for (head, i), tile in self.coded.items():
            weights = p[head, :, _rows(i)]
            weights = torch.nn.functional.pad(weights, (0, PAGE_TOKENS - weights.shape[1]))
            out[head] += tile.weigh(weights)
        return out

    def mark(self, hits: UInt64Array, seen: torch.Tensor) -> None:
        """Set the bits of hits [E, Hkv] where seen [Hkv, n]."""
        for i, entry in enumerate(self.entries):
            for head in range(len(seen)):
                bits = seen[head, _rows(i)].tolist()  # [] beyond n
                hits[entry, head] |= np.uint64(sum(1 << t for t, bit in enumerate(bits) if bit))

    def stamp(self, stamps: Int32Array, seen: torch.Tensor, position: int) -> None:
        """Raise stamps [E, Hkv, S] to `position` where seen [Hkv, n]."""
        for i, entry in enumerate(self.entries):
            own = seen[:, _rows(i)].numpy()
            hit = stamps[entry, :, : own.shape[1]]
            hit[own] = np.maximum(hit[own], position)


def _states(attended: Attended) -> torch.Tensor:
    """Return results as states [T, Hq, D + 2]."""
    there = torch.where(attended.lse2.isinf(), 0.0, 1.0)
    parts = (attended.lse2[..., None], there[..., None], attended.out.float())
    return torch.cat(parts, dim=-1)


def _tokens_of(plan: AttentionPlan, begin: int, end: int) -> AttentionPlan:
    """Return a plan of one group with the pages of tokens [begin, end) alone."""
    runs = []
    for run in (Run(*one) for one in plan.runs.tolist()):
        first = max(0, (begin - run.first_position) // PAGE_TOKENS)
        last = min(run.page_count, (end - run.first_position) // PAGE_TOKENS)
        if first < last:
            at = run.first_position + first * PAGE_TOKENS
            runs.append(Run(run.page_begin + first, last - first, at, run.layout))
    groups = np.array([[0, len(plan.row_positions), 0, len(runs)]], np.int32)
    return replace(plan, groups=groups, runs=np.array(runs, np.int32).reshape(-1, 4))


def _rows(place: int) -> slice:
    """Return the tokens of a group's page at `place`."""
    return slice(place * PAGE_TOKENS, (place + 1) * PAGE_TOKENS)


def _live(kv: LayerKV, plan: AttentionPlan, entry: int, head: int) -> torch.Tensor:
    """Return which of a tile's tokens are live, [S] bool."""
    if plan.masks is None:
        return torch.ones(PAGE_TOKENS, dtype=torch.bool)
    mask = int(plan.masks[entry, kv.layer, head])
    return torch.tensor([bool(mask >> t & 1) for t in range(PAGE_TOKENS)])


def _tile_id(kv: LayerKV, plan: AttentionPlan, entry: int, head: int) -> int:
    page = int(plan.pages[entry])
    if page >= 0:
        return int(kv.tile_table[page, kv.layer, head])
    if plan.private_tiles is None:
        raise KernelInputError("plan names a private tile and brings none")
    return int(plan.private_tiles[-1 - page, kv.layer, head])


def _raw_tile(kv: LayerKV, layout: Layout, tile: int, *, first: bool = False) -> torch.Tensor:
    """Return the bytes of a tile, of the page at position 0 if `first`."""
    begin, size = tile * kv.unit_bytes, tile_bytes(layout, kv.head_dim, first=first)
    if not 0 <= begin <= kv.buffer.numel() - size:
        raise KernelInputError("the plan names a page without a tile in the pool")
    return kv.buffer[begin : begin + size]


def _tile(kv: LayerKV, layout: Layout, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of one tile: K [S/16, D/p, 16, p] and V [S/p, D, p], p tokens or dims paired."""
    pair, dim = _PAIR[layout], kv.head_dim
    raw = _raw_tile(kv, layout, tile)
    keys, values = raw.view(TORCH_DTYPE[layout]).view(2, PAGE_TOKENS * dim)
    return (
        keys.view(PAGE_TOKENS // _GROUP_TOKENS, dim // pair, _GROUP_TOKENS, pair),
        values.view(PAGE_TOKENS // pair, dim, pair),
    )


def _layout_of(dtype: torch.dtype) -> Layout:
    if dtype in LANE_LAYOUTS:
        return LANE_LAYOUTS[dtype]
    raise KernelInputError(
        f"queries, keys and values are {dtype}; float32 and bfloat16 are supported"
    )
