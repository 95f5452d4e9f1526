"""Attention on a device: a plan becomes tasks once, every layer launches them.

One launch per layout and row class, then one merge of the rows that more than one task holds: there
a row's coded pages and those in the model's dtype meet. On a CPU the kernels run through Triton's
interpreter, where `TRITON_INTERPRET=1` was set before it was imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops import triton_codes as codes
from kvkeep.ops import triton_kernels as kernels
from kvkeep.ops.checks import (
    check_appended,
    check_entries,
    check_parts,
    check_pool,
    check_tiles,
    check_unit,
    dense_rows,
    entry_bytes,
    run_layouts,
    validate,
)
from kvkeep.ops.codes import CODE_BITS, tile_bytes
from kvkeep.ops.device import programs_of
from kvkeep.ops.layout import (
    ROW_LAYOUTS,
    Attended,
    AttentionPlan,
    LayerKV,
    Observe,
)
from kvkeep.ops.tasks import ROW_CLASSES, TASK_FIELDS, Tasks, cut_tasks
from kvkeep.ops.triton_observe import Looked
from kvkeep.ops.upload import Uploader
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout, UInt64Array

_APPENDED: Final = 16
"""Tokens that one program appends."""


class _Arrays(NamedTuple):
    """A plan's arrays on the device, in the order of their upload."""

    tasks: torch.Tensor
    visits: torch.Tensor
    targets: torch.Tensor
    order: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor
    private: torch.Tensor
    masks: torch.Tensor
    merge_rows: torch.Tensor
    merge_bounds: torch.Tensor
    merge_slots: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A plan cut into tasks for one query shape, and its arrays on the device."""

    plan: AttentionPlan
    tile_table: Int32Array
    query: tuple[torch.Size, torch.dtype, torch.device]
    tasks: Tasks
    visit_bytes: np.ndarray[Any, np.dtype[np.int64]]
    """[V] bytes of a visit's tile of one KV head."""
    coded_visits: int
    arrays: _Arrays

    @property
    def fixed(self) -> tuple[object, ...]:
        """Return what a captured graph keeps: grids, rooms, and where the arrays lie."""
        tasks, places = self.tasks, tuple(array.data_ptr() for array in self.arrays)
        return tasks.launches, len(tasks.merge_rows), tasks.part_slots, places

    def bytes_read(self, kv: LayerKV) -> int:
        """Return the bytes of the tiles one layer's tasks load: those with a live token."""
        masks = self.plan.masks
        if masks is None:
            return int(self.visit_bytes.sum()) * kv.num_kv_heads
        live = np.count_nonzero(masks[self.tasks.visits[:, 0], kv.layer], axis=1)
        return int(self.visit_bytes @ live)


class _Kernels(NamedTuple):
    """What attends tiles of one layout, and what it is told beside `_Told`'s arguments."""

    node: Any
    observe: Any
    tiles: tuple[torch.Tensor, ...]
    """The pool's buffer in the units the kernels load."""
    fixed: dict[str, Any]


class TritonAttention:
    """`AttentionOps` in Triton over tiles of plain rows; calls take turns.

    A plan is prepared and uploaded once for all layers of a step: its arrays must not change in
    between.
    """

    def __init__(
        self, device: torch.device, programs: int | None = None, *, decode: bool = False
    ) -> None:
        """`decode`: widen codes to floats before they are multiplied, as a baseline."""
        self._device = device
        self._decode = decode
        self._programs = programs or programs_of(device)
        self.calls = 0
        """Number of `attend` calls so far."""
        self.bytes_read = 0
        """Bytes of K and V that `attend` has read so far, by the tasks launched."""
        self.decode_calls = 0
        """How often a coded tile was widened to floats: `decode` alone does it."""
        self._plan_upload = Uploader(device)
        self._slots_upload = Uploader(device)
        self._threshold_upload = Uploader(device)
        self._last: _Prepared | None = None
        self._slots: tuple[Int32Array, Int32Array, torch.Tensor, torch.Tensor] | None = None
        self._observed: tuple[Observe, torch.Tensor] | None = None
        self._idle = torch.zeros((1, TASK_FIELDS), dtype=torch.int32, device=device)
        self._compiled: set[tuple[object, ...]] = set()

    @property
    def transfers(self) -> int:
        """Return the uploads so far: one per plan, step's slots and step's thresholds."""
        uploads = (self._plan_upload, self._slots_upload, self._threshold_upload)
        return sum(upload.transfers for upload in uploads)

    def prepare(self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> tuple[object, ...]:
        """Cut a plan into work and upload it now; the step's first `attend` does so otherwise.

        Return what a graph captured of `attend` keeps: for equal ones, it attends this plan.
        """
        return self._prepare(q, kv, plan).fixed

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Write k, v [T, Hkv, D] at `slots` [T] = page slot * S + row; -1 skips a row."""
        _check_pool(kv, k, "k")
        check_appended(kv, k, v, len(slots))
        if not len(slots):
            return
        table, there = self._slots_of(kv, slots, ROW_LAYOUTS[k.dtype])
        k, v = dense_rows(k), dense_rows(v)
        kernels.append_kernel[-(-len(slots) // _APPENDED), kv.num_kv_heads](
            kv.buffer.view(k.dtype), table, there, k, v, len(slots), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), kv.layer, kv.tile_table.shape[1], kv.num_kv_heads,
            PAGE_TOKENS, kv.head_dim, _block(kv.head_dim), kv.unit_bytes // k.element_size(),
            _APPENDED,
        )  # fmt: skip

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Attend q [T, Hq, D] over the plan's runs; see `AttentionOps.attend`."""
        prepared = self._prepare(q, kv, plan)
        rows, heads, dim = q.shape
        q = dense_rows(q)
        out = torch.empty((rows, heads, dim), dtype=q.dtype, device=self._device)
        lse2 = torch.empty((rows, heads), dtype=torch.float32, device=self._device)
        parts = (prepared.tasks.part_slots, heads)
        part_out = torch.empty((*parts, dim), dtype=torch.float32, device=self._device)
        part_lse2 = torch.empty(parts, dtype=torch.float32, device=self._device)
        arrays = prepared.arrays
        common = self._shape_arguments(q, kv, plan)
        for layout, row_class, tasks in self._launches(prepared, q, kv):
            chosen = self._kernels_of(layout, q, kv)
            chosen.node[len(tasks), kv.num_kv_heads](
                *chosen.tiles, arrays.table, tasks,
                arrays.visits, arrays.targets, arrays.order, arrays.positions, arrays.pages,
                arrays.private, arrays.masks, q, out, lse2, part_out, part_lse2,
                **common, **chosen.fixed, ROWS=row_class, num_warps=_warps(row_class),
            )  # fmt: skip
        self._merge_into(
            part_out, part_lse2, arrays.merge_rows, arrays.merge_bounds, arrays.merge_slots,
            out, lse2,
        )  # fmt: skip
        self.calls += 1
        self.bytes_read += prepared.bytes_read(kv)
        self.decode_calls += prepared.coded_visits * kv.num_kv_heads * self._decode
        if observe is None:
            return Attended(out, lse2, None)
        return Attended(out, lse2, *self._observe(q, kv, prepared, lse2, observe, common))

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge parts [N, T, Hq, D] and [N, T, Hq] left to right; one with lse2 = -inf is empty."""
        _check_dtype(outs.dtype, "outs")
        check_parts(outs, lse2s)
        parts, rows, heads, dim = outs.shape
        index = torch.arange(rows + 1, dtype=torch.int32, device=outs.device)
        slots = torch.arange(parts * rows, dtype=torch.int32, device=outs.device)
        out = torch.empty((rows, heads, dim), dtype=outs.dtype, device=outs.device)
        lse2 = torch.empty((rows, heads), dtype=torch.float32, device=outs.device)
        self._merge_into(
            outs.contiguous(), lse2s.contiguous(), index[:rows], index * parts,
            slots.view(parts, rows).T.contiguous(), out, lse2,
        )  # fmt: skip
        return out, lse2

    def _launches(
        self, prepared: _Prepared, q: torch.Tensor, kv: LayerKV
    ) -> list[tuple[Layout, int, torch.Tensor]]:
        """Return each launch's layout, row class and tasks.

        The first step of a shape launches an idle task of every class, so that all are compiled
        before a client waits for them.
        """
        plan, tasks = prepared.plan, prepared.arrays.tasks
        found = [
            (launch.layout, launch.rows, tasks[launch.begin : launch.end])
            for launch in prepared.tasks.launches
        ]
        heads = q.shape[1] // kv.num_kv_heads
        for layout in {layout for layout, _, _ in found}:
            told = (plan.private_tiles is None, plan.masks is None)
            shape = (layout, q.dtype, heads, kv.head_dim, *told)
            if shape not in self._compiled:
                self._compiled.add(shape)
                found += [(layout, rows, self._idle) for rows in ROW_CLASSES]
        return found

    def _merge_into(
        self,
        part_out: torch.Tensor,
        part_lse2: torch.Tensor,
        rows: torch.Tensor,
        bounds: torch.Tensor,
        slots: torch.Tensor,
        out: torch.Tensor,
        lse2: torch.Tensor,
    ) -> None:
        """Fold parts [*, Hq, D] into the named rows of out [T, Hq, D] and lse2 [T, Hq]."""
        heads, dim = out.shape[1:]
        if len(rows) and heads:
            kernels.merge_kernel[len(rows), heads](
                part_out, part_lse2, rows, bounds, slots, out, lse2, heads, dim, _block(dim)
            )

    def _observe(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        prepared: _Prepared,
        lse2: torch.Tensor,
        observe: Observe,
        common: dict[str, Any],
    ) -> tuple[UInt64Array, Int32Array | None]:
        """Return hits [E, Hkv] and, if asked, stamps: what all tasks found, joined on the host."""
        visits, arrays = prepared.tasks.visits, prepared.arrays
        thresholds = self._thresholds(observe, q.shape[0], q.shape[1])
        found = Looked(visits, kv.num_kv_heads, self._device, stamps=observe.stamps)
        for launch in prepared.tasks.launches:
            chosen = self._kernels_of(launch.layout, q, kv)
            chosen.observe[launch.end - launch.begin, kv.num_kv_heads](
                *chosen.tiles, arrays.table, arrays.tasks[launch.begin :],
                arrays.visits, arrays.order, arrays.positions, arrays.pages, arrays.private,
                arrays.masks, q, lse2, thresholds, found.words, found.stamps, **common,
                **chosen.fixed, ROWS=launch.rows, STAMPS=observe.stamps,
                num_warps=_warps(launch.rows),
            )  # fmt: skip
        return found.joined(len(prepared.plan.pages))

    def _thresholds(self, observe: Observe, rows: int, heads: int) -> torch.Tensor:
        """Return thresholds [T, Hq] on the device, kept from the layer before if they are its."""
        if self._observed is None or self._observed[0] is not observe:
            values = observe.by_query_head(rows, heads)
            self._observed = observe, self._threshold_upload([values])[0]
        return self._observed[1]

    def _slots_of(
        self, kv: LayerKV, slots: Int32Array, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tile table and the slots on the device, kept from the layer before."""
        last = self._slots
        if last is not None and last[0] is slots and last[1] is kv.tile_table:
            return last[2], last[3]
        top = int(slots.max())
        if top // PAGE_TOKENS >= len(kv.tile_table) or int(slots.min()) < -1:
            raise KernelInputError("a slot lies outside the tile table")
        written = np.unique(slots[slots >= 0] // PAGE_TOKENS)
        check_tiles(kv, kv.tile_table[written], np.int64(tile_bytes(layout, kv.head_dim)))
        own = [] if kv.device_table is not None else [kv.tile_table]
        there, *copied = self._slots_upload([slots.astype(np.int32, copy=False), *own])
        table = copied[0] if kv.device_table is None else kv.device_table
        self._slots = slots, kv.tile_table, table, there
        return table, there

    def _prepare(self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> _Prepared:
        """Return the plan's tasks, kept from the layer before where nothing changed."""
        last, query = self._last, (q.shape, q.dtype, q.device)
        if (
            last is not None
            and last.plan is plan
            and last.tile_table is kv.tile_table
            and last.query == query
        ):
            return last
        _check_pool(kv, q, "q")
        validate(q, kv, plan)
        layout, group = ROW_LAYOUTS[q.dtype], q.shape[1] // kv.num_kv_heads
        for stored in run_layouts(plan, layout):
            check_unit(kv, stored)
        tasks = cut_tasks(plan, layout, group, kv.num_kv_heads, self._programs)
        sizes = entry_bytes(plan, kv.head_dim)
        check_entries(kv, plan, sizes)
        nothing = np.zeros(1, np.int32)
        private, masks = plan.private_tiles, plan.masks
        arrays = [
            tasks.tasks, tasks.visits, tasks.targets, tasks.order,
            np.asarray(plan.row_positions, np.int32), np.asarray(plan.pages, np.int32),
            nothing if private is None else np.asarray(private, np.int32),
            nothing if masks is None else masks,
            tasks.merge_rows, tasks.merge_bounds, tasks.merge_slots,
            kv.tile_table if kv.device_table is None else nothing,
        ]  # fmt: skip
        there = _Arrays(*self._plan_upload(arrays))
        if kv.device_table is not None:
            there = there._replace(table=kv.device_table)
        coded = sum(
            tasks.num_visits(launch) for launch in tasks.launches if launch.layout != layout
        )
        self._last = _Prepared(
            plan, kv.tile_table, query, tasks, sizes[tasks.visits[:, 0]], coded, there
        )
        return self._last

    def _kernels_of(self, layout: Layout, q: torch.Tensor, kv: LayerKV) -> _Kernels:
        """Return the kernels of tiles of a layout."""
        dim, buffer = kv.head_dim, kv.buffer
        if layout not in CODE_BITS:
            fixed = {"BLOCK_D": _block(dim), "UNIT": kv.unit_bytes // q.element_size()}
            own = buffer.view(q.dtype)
            return _Kernels(kernels.node_kernel, kernels.observe_kernel, (own,), fixed)
        told = codes.coded_arguments(layout, dim, kv.unit_bytes, decode=self._decode)
        return _Kernels(
            codes.coded_node_kernel,
            codes.coded_observe_kernel,
            (buffer, buffer.view(torch.int16)),
            {**told, "enable_fp_fusion": False},
        )

    @staticmethod
    def _shape_arguments(q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> dict[str, Any]:
        """Return what the node and the observing kernel are told alike, by its name there."""
        _, heads, dim = q.shape
        return {
            "q_token": q.stride(0),
            "q_head": q.stride(1),
            "layer": kv.layer,
            "num_layers": kv.tile_table.shape[1],
            "num_kv_heads": kv.num_kv_heads,
            "scale": math.log2(math.e) / math.sqrt(dim),
            "G": heads // kv.num_kv_heads,
            "S": PAGE_TOKENS,
            "D": dim,
            "HAS_PRIVATE": plan.private_tiles is not None,
            "HAS_MASKS": plan.masks is not None,
        }


def _warps(rows: int) -> int:
    """Return the warps of a program: its accumulators must fit their registers."""
    return 8 if rows > 64 else 4


def _block(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in ROW_LAYOUTS:
        raise KernelInputError(f"{name} is {dtype}; the kernels take float32, float16 and bfloat16")


def _check_pool(kv: LayerKV, x: torch.Tensor, name: str) -> None:
    """Raise where a layer's tiles are not plain rows of x's dtype on x's device."""
    _check_dtype(x.dtype, name)
    if x.device.type != kv.buffer.device.type:
        raise KernelInputError(f"{name} is on {x.device.type}, the pool on {kv.buffer.device.type}")
    check_pool(kv, ROW_LAYOUTS[x.dtype])
