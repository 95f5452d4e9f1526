"""What every attention path checks before a kernel runs: shapes, tables, sizes, numbers."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.errors import KernelInputError
from kvkeep.ops.codes import CODE_BITS, tile_bytes
from kvkeep.ops.layout import CARRIED, AttentionPlan, LayerKV
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout, UInt64Array

Int64Array = NDArray[np.int64]

_DIM_STEP: Final = 16
_LAST_POSITION: Final = np.iinfo(np.int32).max


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x with its last dimension contiguous: kernels take any stride of the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_dim(dim: int) -> None:
    """Raise where no kernel takes heads of `dim` channels."""
    if dim <= 0 or dim % _DIM_STEP:
        raise KernelInputError(f"head_dim {dim} is not a multiple of {_DIM_STEP}")


def check_pool(kv: LayerKV, layout: Layout) -> None:
    """Raise where a layer's view of the pool contradicts itself or holds no tiles of `layout`."""
    check_dim(kv.head_dim)
    check_unit(kv, layout)
    if kv.tile_table.ndim != 3 or kv.tile_table.dtype != np.int32:
        raise KernelInputError("the tile table must be int32 [page slots, L, Hkv]")
    _, layers, heads = kv.tile_table.shape
    if heads != kv.num_kv_heads or not 0 <= kv.layer < layers:
        raise KernelInputError(
            f"the tile table has {layers} layers of {heads} heads; "
            f"asked for layer {kv.layer} of {kv.num_kv_heads}"
        )


def check_unit(kv: LayerKV, layout: Layout) -> None:
    """Raise where tiles of a layout are no whole number of the pool's units."""
    size = tile_bytes(layout, kv.head_dim)
    if kv.unit_bytes <= 0 or size % kv.unit_bytes:
        raise KernelInputError(
            f"a pool in units of {kv.unit_bytes} bytes does not hold {layout.name} tiles of {size}"
        )


def check_coded(kv: LayerKV) -> None:
    """Raise where a layer's heads have no coded layout each."""
    heads = kv.coded
    if heads is None:
        return
    fits = heads.shape == (kv.num_kv_heads,) and heads.flags.c_contiguous
    if not fits or heads.dtype != np.int32:
        raise KernelInputError("a layer's coded layouts must be dense int32 [Hkv]")
    if not np.isin(heads, [*map(int, CODE_BITS)]).all():
        raise KernelInputError("a layer's coded layouts hold one that is not coded")


def check_appended(kv: LayerKV, k: torch.Tensor, v: torch.Tensor, count: int) -> None:
    """Raise where k and v are not `count` rows of the pool's heads."""
    shape = (count, kv.num_kv_heads, kv.head_dim)
    if k.shape != shape or v.shape != shape or v.dtype != k.dtype:
        raise KernelInputError(
            f"k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype} must both be {shape}"
        )


def check_parts(outs: torch.Tensor, lse2s: torch.Tensor) -> None:
    """Raise where parts to merge are not [N, T, Hq, D] with float32 [N, T, Hq]."""
    if outs.dim() != 4 or outs.shape[:3] != lse2s.shape or lse2s.dtype != torch.float32:
        raise KernelInputError(
            f"outs {tuple(outs.shape)} and lse2s {tuple(lse2s.shape)} {lse2s.dtype} "
            "do not fit: pass [N, T, Hq, D] and float32 [N, T, Hq]"
        )


def check_states(q: torch.Tensor, plan: AttentionPlan, states: torch.Tensor) -> None:
    """Raise where states to go on from do not fit the queries, or no group goes on from any."""
    rows, heads, dim = q.shape
    if states.shape != (2, rows, heads, dim + 2) or states.dtype != torch.float32:
        raise KernelInputError(
            f"states {tuple(states.shape)} {states.dtype} do not fit q {tuple(q.shape)}:"
            " pass float32 [2, T, Hq, D + 2]"
        )
    if plan.parents is None or not np.any(plan.parents == CARRIED):
        raise KernelInputError("no group of the plan goes on from states")


def validate(q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> None:
    """Raise `KernelInputError` where a plan does not fit its arrays, before any kernel runs.

    Queries may hold anything: what is not finite concerns the rows it is in, not their step.
    """
    if q.dim() != 3:
        raise KernelInputError(f"q has {q.dim()} dimensions; pass [T, Hq, D]")
    rows, heads, dim = q.shape
    if dim != kv.head_dim or not heads or heads % kv.num_kv_heads:
        raise KernelInputError(
            f"q has {heads} heads of {dim}; the pool has {kv.num_kv_heads} of {kv.head_dim}"
        )
    if plan.row_positions.shape != (rows,):
        raise KernelInputError(f"plan has {len(plan.row_positions)} rows, q has {rows}")
    if plan.groups.shape[1:] != (4,) or plan.runs.shape[1:] != (4,) or plan.pages.ndim != 1:
        raise KernelInputError("a plan's groups and runs must be [n, 4], its pages [E]")
    _check_pages(kv, plan)
    if plan.parents is not None and plan.parents.shape != plan.groups.shape[:1]:
        raise KernelInputError("parents and groups differ in length")
    if plan.row_order is not None and plan.row_order.shape != (rows,):
        raise KernelInputError("the order of rows and the rows differ in length")
    groups = plan.groups
    if len(groups) and (int(groups[:, 1].max()) > rows or int(groups[:, 3].max()) > len(plan.runs)):
        raise KernelInputError("a group reaches outside the plan's rows or runs")


def _check_pages(kv: LayerKV, plan: AttentionPlan) -> None:
    """Raise where runs, pages, masks and tiles do not fit each other or the tile table."""
    a_page = kv.tile_table.shape[1:]
    if plan.private_tiles is not None and plan.private_tiles.shape[1:] != a_page:
        raise KernelInputError(f"private tiles must be [n, L, Hkv]: {a_page} for each page")
    if plan.masks is not None and plan.masks.shape != (len(plan.pages), *a_page):
        raise KernelInputError(f"live masks must be [E, L, Hkv]: {a_page} for each page")
    if len(plan.pages):
        private = 0 if plan.private_tiles is None else len(plan.private_tiles)
        low, high = int(plan.pages.min()), int(plan.pages.max())
        if high >= len(kv.tile_table) or low < -private:
            raise KernelInputError("plan names a page outside the pool's tile table")
    if len(plan.runs):
        begins, counts, positions = plan.runs[:, :3].T.astype(np.int64)
        if int((begins + counts).max()) > len(plan.pages) or int(plan.runs.min()) < 0:
            raise KernelInputError("a run reaches outside the plan's pages")
        if int((positions + counts * PAGE_TOKENS).max()) > _LAST_POSITION:
            raise KernelInputError("a run reaches beyond the last position there is")
        if np.any(plan.runs[:, 2] % PAGE_TOKENS):
            raise KernelInputError("a run starts inside a page")
        if plan.private_tiles is not None:
            _check_beginnings(plan)


def check_forest(plan: AttentionPlan) -> None:
    """Raise unless parents come first and hold their children, and leaves hold every row once.

    What the native kernels check themselves; for all others, after `validate`.
    """
    rows, groups, count = len(plan.row_positions), plan.groups, len(plan.groups)
    order, parents = plan.row_order, np.full(count, -1, np.int64)
    if order is not None and not np.array_equal(np.sort(order), np.arange(rows)):
        raise KernelInputError("the order of rows does not name every row once")
    if plan.parents is not None:
        parents = plan.parents.astype(np.int64)
    if np.any(groups[:, 0] > groups[:, 1]) or np.any(groups[:, 2] > groups[:, 3]):
        raise KernelInputError("a group's rows or runs end before they begin")
    if count and (int(groups.min()) < 0 or np.any(parents >= np.arange(count))):
        raise KernelInputError("a group comes before its parent")
    held = parents >= 0
    above = groups[np.where(held, parents, 0)] if count else groups
    if np.any(held & ((groups[:, 0] < above[:, 0]) | (groups[:, 1] > above[:, 1]))):
        raise KernelInputError("a group has rows that its parent lacks")
    leaves = np.ones(count, np.bool_)
    leaves[parents[held]] = False
    covered = np.zeros(rows + 1, np.int64)
    np.add.at(covered, groups[leaves, 0], 1)
    np.add.at(covered, groups[leaves, 1], -1)
    if count and np.any(np.cumsum(covered)[:rows] != 1):
        raise KernelInputError("leaf groups do not hold every row once")


def _check_beginnings(plan: AttentionPlan) -> None:
    """Raise where a private tile begins a coded sequence: no sinks follow it."""
    coded = np.isin(plan.runs[:, 3], [*map(int, CODE_BITS), int(Layout.BY_HEAD)])
    begins = plan.runs[coded & (plan.runs[:, 1] > 0) & (plan.runs[:, 2] == 0), 0]
    if np.any(plan.pages[begins] < 0):
        raise KernelInputError("a private tile begins a coded sequence: it has no sinks")


def run_layouts(plan: AttentionPlan, model: Layout) -> set[Layout]:
    """Return the layouts of a plan's runs other than that of the model's dtype.

    Raises `KernelInputError` where one is neither that nor a coded one, the same for all heads.
    """
    found = set(np.unique(plan.runs[:, 3]).tolist()) - {int(model)}
    if found - set(map(int, CODE_BITS)):
        raise KernelInputError("a run's layout is neither coded nor that of the queries' dtype")
    return {Layout(layout) for layout in found}


def coded_layouts(kv: LayerKV, plan: AttentionPlan, model: Layout) -> set[Layout]:
    """Return the layouts of a plan's tiles in a layer other than that of the model's dtype.

    Raises `KernelInputError` where one is neither that nor a coded one.
    """
    found = set(np.unique(plan.runs[:, 3]).tolist()) - {int(model)}
    if kv.coded is not None and int(Layout.BY_HEAD) in found:
        check_coded(kv)
        found = found - {int(Layout.BY_HEAD)} | set(kv.coded.tolist())
    if found - set(map(int, CODE_BITS)):
        raise KernelInputError("a run's layout is neither coded nor that of the queries' dtype")
    return {Layout(layout) for layout in found}


def entry_bytes(plan: AttentionPlan, head_dim: int) -> Int64Array:
    """Return the bytes [E] of one KV head's tile of each page entry, its sinks included."""
    sizes = np.zeros(len(plan.pages), np.int64)
    for begin, count, first, number in plan.runs.tolist():
        layout = Layout(number)
        sizes[begin : begin + count] = tile_bytes(layout, head_dim)
        if count and not first:
            sizes[begin] = tile_bytes(layout, head_dim, first=True)
    return sizes


def check_entries(kv: LayerKV, plan: AttentionPlan, sizes: Int64Array) -> None:
    """Raise where a page with a live token has no tile of its `sizes` [E]."""
    pages, private, masks = plan.pages, plan.private_tiles, plan.masks
    for chosen, tiles in (
        (pages >= 0, kv.tile_table[pages[pages >= 0]]),
        (pages < 0, None if private is None else private[-1 - pages[pages < 0]]),
    ):
        if tiles is not None:
            own = None if masks is None else masks[chosen]
            check_tiles(kv, tiles, sizes[chosen][:, None, None], own)


def check_tiles(
    kv: LayerKV,
    tiles: Int32Array,
    sizes: Int64Array | np.int64,
    masks: UInt64Array | None = None,
) -> None:
    """Raise where tiles [n, L, Hkv] with a live token do not lie in the pool."""
    last = (kv.buffer.numel() - sizes) // kv.unit_bytes
    bad = (tiles < 0) | (tiles > last)
    if masks is not None:
        bad &= masks != 0
    if bad.any():
        raise KernelInputError("the plan names a page without a tile in the pool")
