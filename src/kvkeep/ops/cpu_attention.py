"""Attention on the CPU: checks shapes once per plan and hands addresses to the native kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops import _native
from kvkeep.ops.checks import (
    check_appended,
    check_coded,
    check_dim,
    check_parts,
    check_pool,
    check_states,
    check_unit,
    coded_layouts,
    dense_rows,
    validate,
)
from kvkeep.ops.layout import (
    LANE_LAYOUTS,
    Attended,
    AttentionPlan,
    LayerKV,
    Observe,
)
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout

_NATIVE = {Layout.F32: _native.Layout.F32, Layout.BF16: _native.Layout.BF16}


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A plan cut into work for one query shape, and the arrays whose addresses it keeps."""

    plan: AttentionPlan
    tile_table: Int32Array
    query: tuple[torch.Size, torch.dtype, bool]
    """Its shape and dtype, and whether states are left."""
    native: _native.PreparedPlan
    arrays: tuple[np.ndarray | None, ...]


class CpuAttention:
    """`AttentionOps` of one native backend; calls take turns.

    A plan is prepared once for all layers of a step: its arrays must not change in between.
    """

    def __init__(
        self, backend: _native.Backend, *, widen: _native.Widen = _native.Widen.NO
    ) -> None:
        """`widen`: coded tiles are widened instead, which benchmarks compare with."""
        self._backend = backend
        self._native = _native.Attention(backend, widen)
        self._last: _Prepared | None = None
        self._last_slots: tuple[Int32Array | None, int] = (None, 0)
        self._caches: dict[tuple[int, Layout], tuple[LayerKV, _native.Cache]] = {}

    @property
    def calls(self) -> int:
        """Return the number of `attend` calls so far."""
        return self._native.calls

    @property
    def makespan_over_bound(self) -> float:
        """Return the last plan's predicted makespan over max(work / threads, longest item)."""
        return 1.0 if self._last is None else self._last.native.makespan

    @property
    def pieces_beside(self) -> int:
        """Return the last plan's pieces that are read while others' rows are multiplied."""
        return 0 if self._last is None else self._last.native.pieces_beside

    @property
    def decode_calls(self) -> int:
        """Return how often a coded tile was widened: attention that is told to alone does it."""
        return self._native.decoded

    @property
    def bytes_read(self) -> int:
        """Return the bytes of K and V that `attend` has read so far."""
        return self._native.bytes_read

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Write k, v [T, Hkv, D] at `slots` [T] = page slot * S + row; -1 skips a row."""
        layout = _layout_of(k.dtype, "k")
        check_appended(kv, k, v, len(slots))
        k, v = dense_rows(k), dense_rows(v)
        slots_address = self._slots_address(slots)
        k_token, k_head, _ = k.stride()
        v_token, v_head, _ = v.stride()
        cache = self._cache(kv, layout)
        try:
            self._native.append(
                _NATIVE[layout],
                cache,
                k.data_ptr(),
                k_token,
                k_head,
                v.data_ptr(),
                v_token,
                v_head,
                slots_address,
                len(slots),
            )
        except ValueError as error:
            raise KernelInputError(str(error)) from None

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Attend q [T, Hq, D] over the plan's runs; see `AttentionOps.attend`."""
        return self._attend(q, kv, plan, observe)

    def attend_part(self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> torch.Tensor:
        """Return states [2, T, Hq, D + 2], see `PartOps.attend_part`."""
        rows, heads, dim = q.shape
        left = torch.empty((2, rows, heads, dim + 2), dtype=torch.float32)
        self._attend(q, kv, plan, left=left)
        return left

    def attend_after(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        states: torch.Tensor,
        observe: Observe | None = None,
    ) -> Attended:
        """Attend, going on from states; see `PartOps.attend_after`."""
        check_states(q, plan, states)
        return self._attend(q, kv, plan, observe, carried=states.contiguous())

    def _attend(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        observe: Observe | None = None,
        *,
        carried: torch.Tensor | None = None,
        left: torch.Tensor | None = None,
    ) -> Attended:
        layout = _layout_of(q.dtype, "q")
        prepared = self._prepare(q, kv, plan, layout, leaves=left is not None)
        q = dense_rows(q)
        rows, heads, dim = q.shape
        q_token, q_head, _ = q.stride()
        out = torch.empty((rows, heads, dim), dtype=q.dtype)
        lse2 = torch.empty((rows, heads), dtype=torch.float32)
        thresholds = hits = stamps = None
        if observe is not None:
            thresholds = observe.by_query_head(rows, heads)
            hits = np.zeros((len(plan.pages), kv.num_kv_heads), np.uint64)
            if observe.stamps:
                stamps = np.full((*hits.shape, PAGE_TOKENS), -1, np.int32)
        cache = self._cache(kv, layout)
        try:
            self._native.attend(
                prepared.native,
                cache,
                q.data_ptr(),
                q_token,
                q_head,
                out.data_ptr(),
                lse2.data_ptr(),
                math.log2(math.e) / math.sqrt(dim),
                _address(thresholds),
                _address(hits),
                _address(stamps),
                0 if carried is None else carried.data_ptr(),
                0 if left is None else left.data_ptr(),
            )
        except ValueError as error:
            raise KernelInputError(str(error)) from None
        return Attended(out, lse2, hits, stamps)

    def prepare(self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> None:
        """Cut a plan into work now; the step's first `attend` does so otherwise."""
        self._prepare(q, kv, plan, _layout_of(q.dtype, "q"))

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge parts [N, T, Hq, D] and [N, T, Hq] left to right; one with lse2 = -inf is empty."""
        layout = _layout_of(outs.dtype, "outs")
        check_parts(outs, lse2s)
        parts, rows, heads, dim = outs.shape
        check_dim(dim)
        outs, lse2s = outs.contiguous(), lse2s.contiguous()
        out = torch.empty((rows, heads, dim), dtype=outs.dtype)
        lse2 = torch.empty((rows, heads), dtype=torch.float32)
        self._native.merge(
            _NATIVE[layout],
            outs.data_ptr(),
            lse2s.data_ptr(),
            parts,
            rows * heads,
            dim,
            out.data_ptr(),
            lse2.data_ptr(),
        )
        return out, lse2

    def _slots_address(self, slots: Int32Array) -> int:
        """Return the address of dense slots, kept from the layer before where they are the same."""
        if slots is not self._last_slots[0]:
            if slots.dtype != np.int32 or not slots.flags.c_contiguous:
                raise KernelInputError("slots must be dense int32")
            self._last_slots = slots, slots.ctypes.data
        return self._last_slots[1]

    def _cache(self, kv: LayerKV, layout: Layout) -> _native.Cache:
        """Return the native view of a layer, kept while the same pool is passed in."""
        known = self._caches.get((kv.layer, layout))
        if known is not None and _same_pool(known[0], kv):
            return known[1]
        native = _native_cache(kv, layout)
        self._caches[kv.layer, layout] = (kv, native)
        return native

    def _prepare(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        layout: Layout,
        *,
        leaves: bool = False,
    ) -> _Prepared:
        """Return the plan's work list, kept from the layer before where nothing changed."""
        last = self._last
        query = (q.shape, q.dtype, leaves)
        if (
            last is not None
            and last.plan is plan
            and last.tile_table is kv.tile_table
            and last.query == query
        ):
            return last
        validate(q, kv, plan)
        check_dim(kv.head_dim)
        for stored in coded_layouts(kv, plan, layout):
            check_unit(kv, stored)
        arrays = (
            np.ascontiguousarray(plan.row_positions, np.int32),
            _optional(plan.row_order, np.int32),
            np.ascontiguousarray(plan.groups, np.int32),
            _optional(plan.parents, np.int32),
            np.ascontiguousarray(plan.runs, np.int32),
            np.ascontiguousarray(plan.pages, np.int32),
            _optional(plan.private_tiles, np.int32),
            _optional(plan.masks, np.uint64),
        )
        positions, order, groups, parents, runs, pages, private, masks = arrays
        try:
            native = _native.prepare_plan(
                self._backend,
                _address(positions),
                len(plan.row_positions),
                _address(order),
                _address(groups),
                _address(parents),
                len(plan.groups),
                _address(runs),
                len(plan.runs),
                _address(pages),
                len(plan.pages),
                _address(private),
                0 if plan.private_tiles is None else len(plan.private_tiles),
                _address(masks),
                _NATIVE[layout],
                q.shape[1] // kv.num_kv_heads,
                kv.num_kv_heads,
                kv.head_dim,
                leaves,
            )
        except ValueError as error:
            raise KernelInputError(str(error)) from None
        self._last = _Prepared(plan, kv.tile_table, query, native, arrays)
        return self._last


def _same_pool(one: LayerKV, other: LayerKV) -> bool:
    return one is other or (
        one.buffer is other.buffer
        and one.tile_table is other.tile_table
        and one.unit_bytes == other.unit_bytes
        and one.coded is other.coded
        and one.num_kv_heads == other.num_kv_heads
        and one.head_dim == other.head_dim
    )


def _layout_of(dtype: torch.dtype, name: str) -> Layout:
    layout = LANE_LAYOUTS.get(dtype)
    if layout is None:
        raise KernelInputError(f"{name} is {dtype}; the kernels take float32 and bfloat16")
    return layout


def _native_cache(kv: LayerKV, layout: Layout) -> _native.Cache:
    """Describe one layer of the pool to the native side, after checking that it fits the layout."""
    check_pool(kv, layout)
    check_coded(kv)
    if not kv.tile_table.flags.c_contiguous:
        raise KernelInputError("the tile table must be contiguous")
    slots, layers, heads = kv.tile_table.shape
    return _native.Cache(
        kv.buffer.data_ptr(),
        kv.buffer.numel(),
        kv.unit_bytes,
        kv.tile_table.ctypes.data,
        slots,
        layers,
        kv.layer,
        heads,
        kv.head_dim,
        _address(kv.coded),
    )


def _optional(array: np.ndarray | None, dtype: type[np.int32 | np.uint64]) -> np.ndarray | None:
    return None if array is None else np.ascontiguousarray(array, dtype)


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data
