"""Shapes, tile layouts and the plan that kernels execute: the one source of truth for memory order.

Shape letters, used in every docstring: `T` tokens (query rows of a step), `Hq`/`Hkv` query/KV
heads, `G` = Hq / Hkv, `D` head_dim, `L` layers, `P` pages, `S` = 64 tokens per page.

Tile layouts (one layer, one KV head, S tokens, K first, then V, 64-byte aligned):

  BF16  K [S/16][D/2][16][2]  token lanes, pairs of dims: vdpbf16ps needs no horizontal sum
        V [S/2][D][2]         dim lanes, pairs of tokens
  F32   K [S/16][D][16]       token lanes
        V [S][D]
  ROWS_BF16, ROWS_F16, ROWS_F32
        K [S][D]              plain rows, for devices that transpose as they load; ROWS_F16 is
        V [S][D]              for tests: no model is served in it
  K2V2, K4V2, K4V4, K8V8      codes and their scales (`ops/codes.py`); a run that is BY_HEAD holds
                              in each layer and KV head one of these

Canonical reduction order. A row attends tokens 0..position. Scores are taken in steps of 128 tokens
at absolute positions; the running state (m, l, O) is carried over the steps of one span of 1,024
tokens and starts afresh at each multiple of 1,024; the spans' states are merged left to right.
Thread splits happen only between spans, so a row's bits depend on its own tokens and positions
alone. `lse2 = m + log2(l)`, base 2, float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops.turns import TurnOps
from kvkeep.types import PAGE_TOKENS, FloatArray, Int32Array, Layout, UInt64Array

STEP_TOKENS = 128
"""Tokens per online-softmax step; nodes and coded boundaries are cut only at its multiples."""

SPAN_TOKENS = 1024
"""Tokens per carried state; threads split only at its multiples."""

TORCH_DTYPE = {
    Layout.F32: torch.float32,
    Layout.BF16: torch.bfloat16,
    Layout.ROWS_F32: torch.float32,
    Layout.ROWS_F16: torch.float16,
    Layout.ROWS_BF16: torch.bfloat16,
}
CARRIED = -2
"""In `AttentionPlan.parents`."""

HOST = torch.device("cpu")

LANE_LAYOUTS = {torch.float32: Layout.F32, torch.bfloat16: Layout.BF16}
"""Layout of each dtype on a CPU."""

ROW_LAYOUTS = {
    torch.float32: Layout.ROWS_F32,
    torch.float16: Layout.ROWS_F16,
    torch.bfloat16: Layout.ROWS_BF16,
}
"""Layout of each dtype on a device."""


def float_tile_bytes(layout: Layout, head_dim: int) -> int:
    """Return the bytes of one K+V tile of a float layout."""
    return 2 * PAGE_TOKENS * head_dim * TORCH_DTYPE[layout].itemsize


class Run(NamedTuple):
    """Columns of `AttentionPlan.runs`: consecutive pages seen by the group's rows."""

    page_begin: int
    """First entry of `AttentionPlan.pages`."""
    page_count: int
    first_position: int
    """Absolute position of the run's first token, a multiple of S."""
    layout: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What to attend, the same for every layer.

    A group is a range of places in the order of rows and the runs they see, in order of position.
    Groups form a forest: a group goes on where its parent ends, at a multiple of 128 tokens, and
    its children divide its rows among them. Every row belongs to exactly one leaf; it sees the
    tokens at positions <= its own of the runs from its root to that leaf.
    """

    row_positions: Int32Array
    """[T] absolute position of each query row."""
    groups: Int32Array
    """[N, 4] row_begin, row_end, run_begin, run_end; parents come before their children."""
    runs: Int32Array
    """[R, 4] as `Run`."""
    pages: Int32Array
    """[E] page slots; negative entries -1-i name row i of `private_tiles`."""
    private_tiles: Int32Array | None = None
    """[n, L, Hkv] tile ids of views that diverged from their pages."""
    masks: UInt64Array | None = None
    """[E, L, Hkv] live masks; None where nothing is evicted."""
    parents: Int32Array | None = None
    """[N] the group that each goes on from, -1 for roots; None: all are roots. `CARRIED`: a group
    goes on, at its first run, from states that another worker's part has left; it shares nothing.
    """
    row_order: Int32Array | None = None
    """[T] query row at each place; None: as they are."""


def chains(plan: AttentionPlan) -> list[tuple[list[int], list[Run]]]:
    """Return each leaf group's query rows, in its order, and the runs from its root to it."""
    count = len(plan.groups)
    parents = [-1] * count if plan.parents is None else plan.parents.tolist()
    order = range(len(plan.row_positions)) if plan.row_order is None else plan.row_order.tolist()
    runs: list[list[Run]] = []
    for (_, _, begin, end), parent in zip(plan.groups.tolist(), parents, strict=True):
        own = [Run(*run) for run in plan.runs[begin:end].tolist()]
        runs.append((runs[parent] if parent >= 0 else []) + own)
    leaves = sorted(set(range(count)) - set(parents))
    return [(list(order[plan.groups[g, 0] : plan.groups[g, 1]]), runs[g]) for g in leaves]


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer of the pool, as kernels see it."""

    buffer: torch.Tensor
    """[bytes] uint8, 64-byte aligned; tile i starts at byte `i * unit_bytes`."""
    tile_table: Int32Array
    """[page slots, L, Hkv] tile ids."""
    unit_bytes: int
    """What tile ids count; a tile's own size follows from its run's layout."""
    layer: int
    num_kv_heads: int
    head_dim: int
    device_table: torch.Tensor | None = None
    """[page slots, L, Hkv] int32, the tile table where the buffer is, kept equal by the pool; None:
    the kernels' own copy is made with each plan.
    """
    coded: Int32Array | None = None
    """[Hkv] layouts that `BY_HEAD` stands for in this layer; None: no run of it is `BY_HEAD`."""

    def layout_of(self, run: int, head: int) -> Layout:
        """Return the layout of a KV head's tiles in a run of layout `run`."""
        return Layout(run if self.coded is None or run != Layout.BY_HEAD else self.coded[head])


@dataclass(frozen=True, slots=True)
class Observe:
    """Ask which tokens the rows looked at: weight >= 2 ** log2_threshold."""

    log2_thresholds: FloatArray
    """[T], [T, 1] or [T, Hkv]; +inf for rows that are not observed."""
    stamps: bool = False
    """Whether to tell which row looked last, where several rows of one view are observed."""

    def by_query_head(self, rows: int, num_q_heads: int) -> FloatArray:
        """Return thresholds [T, Hq]; raises `KernelInputError` where they don't fit the rows."""
        given = self.log2_thresholds.reshape(len(self.log2_thresholds), -1)
        if len(given) != rows or num_q_heads % given.shape[1]:
            raise KernelInputError(
                f"{given.shape} thresholds for {rows} rows of {num_q_heads} heads"
            )
        wide = np.repeat(given, num_q_heads // given.shape[1], axis=1)
        return np.ascontiguousarray(wide, np.float32)


class Attended(NamedTuple):
    """What attention returns."""

    out: torch.Tensor
    """[T, Hq, D] in the query's dtype."""
    lse2: torch.Tensor
    """[T, Hq] float32 log-sum-exp, base 2."""
    hits: UInt64Array | None
    """[E, Hkv] bit per token hit by an observed row and a head of its group, if asked."""
    stamps: Int32Array | None = None
    """[E, Hkv, S] the highest position of a row that hit a token, -1 where none; if asked."""


class WeightFold(Protocol):
    """A change of weights that leaves the model's function alone; packing comes last."""

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor to use for checkpoint tensor `name`, in the same shape and dtype."""


class AttentionOps(Protocol):
    """The attention kernels of one backend."""

    @property
    def bytes_read(self) -> int:
        """Return the bytes of K and V that `attend` has read so far."""

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Write k, v [T, Hkv, D] at `slots` [T] = page slot * S + row; -1 skips a row."""

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Attend q [T, Hq, D] (scale 1/sqrt(D) applied inside) over the plan's runs."""

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge parts [N, T, Hq, D] and [N, T, Hq] left to right; lse2 = -inf: empty."""


class PartOps(Protocol):
    """Attention over a prefix whose pages lie apart: a part leaves states, the rest goes on.

    States are [2, T, Hq, D + 2] float32: m, l and O of a row's complete spans, then of the part of
    the span in which the pages end (lse2 = m + log2(l); m = -inf: empty). They are what a node of a
    plan's forest leaves to its children, so results have the bits of one plan over all pages.
    """

    def attend_part(self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> torch.Tensor:
        """Return what q's rows have gathered over one group's pages, all of which they see."""

    def attend_after(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        states: torch.Tensor,
        observe: Observe | None = None,
    ) -> Attended:
        """Attend as `attend` does; `CARRIED` groups go on from their rows' states.

        Rows of these groups are not observed.
        """


class PackedWeight(Protocol):
    """A weight [N, K] in a backend's own order; opaque to callers."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K)."""

    @property
    def nbytes(self) -> int:
        """Return the bytes read to apply it once."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How the rows of a joined projection [T, (Hq + 2 Hkv) D] divide: queries, keys, values."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: torch.Tensor | None = None
    """[D] weight of the RMS norm over each query head before rotation."""
    k_norm: torch.Tensor | None = None
    eps: float = 0.0

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return strided views q [T, Hq, D], k and v [T, Hkv, D]."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        q, k, v = heads.split_with_sizes(
            (self.num_q_heads, self.num_kv_heads, self.num_kv_heads), dim=1
        )
        return q, k, v


class LeafOps(Protocol):
    """Row-wise kernels whose bits do not depend on the number of rows."""

    def pack(self, weight: torch.Tensor, *, int8: bool = False) -> PackedWeight:
        """Pack weight [N, K]; int8 keeps one scale per output channel."""

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x [T, K] W^T + bias as [T, N] in x's dtype, summed in one order for all T."""

    def gated_mlp(self, x: torch.Tensor, gate_up: PackedWeight, down: PackedWeight) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x)); `gate_up` is [2 F, K], gate rows first."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight over the last dimension, in x's dtype."""

    def rotate_heads(
        self, qkv: torch.Tensor, heads: Heads, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Normalise and rotate qkv's query and key heads in place; cos and sin are [T, D]."""


class Largest(NamedTuple):
    """The first of a row's largest logits."""

    token: int
    logit: float
    """Infinite or not a number where any logit is +inf or not a number; -inf where all are."""


class DrawRow(NamedTuple):
    """A row to draw from, each id in proportion to its weight.

    The weight of logit x is w = 2 ** max((x - top) * scale, -120), exactly 1 at `top`. It is kept
    if w > bound, or if w == bound and the id is below `ties`; else it counts as 0.
    """

    logits: torch.Tensor
    """[V] float32 or bfloat16, dense."""
    top: float
    """The largest of the logits."""
    scale: float
    bound: float
    ties: int
    uniform: float
    """The random number, in (0, 1)."""


class Drawn(NamedTuple):
    """The id at which the running sum of kept weights passes `uniform` of `mass`."""

    token: int
    """-1 where no weight is kept."""
    weight: float
    mass: float
    """The sum of all kept weights."""


class SampleOps(Protocol):
    """Choosing tokens from rows of logits, all of one V; no row's result depends on another."""

    def largest(self, rows: Sequence[torch.Tensor]) -> list[Largest]:
        """Return the largest of each row of logits [V], float32 or bfloat16."""

    def draw(self, rows: Sequence[DrawRow]) -> list[Drawn]:
        """Draw an id per row; the same id for any number of threads."""


@dataclass(frozen=True, slots=True)
class Ops:
    """One backend: its name as shown to the operator, its kernels, and where its tensors live."""

    name: str
    attention: AttentionOps
    leaf: LeafOps
    sample: SampleOps
    turn: TurnOps
    device: torch.device = HOST
    layouts: Mapping[torch.dtype, Layout] = field(default_factory=lambda: LANE_LAYOUTS)
    """Layout of the tiles that `attention` reads, per dtype of the model."""
    parts: PartOps | None = None
    """None: this backend attends whole prefixes only."""
