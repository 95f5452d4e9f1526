"""Oracles written from definitions, and the inputs they judge: shared by tests and benches."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.ops.layout import (
    TORCH_DTYPE,
    Attended,
    AttentionOps,
    AttentionPlan,
    LayerKV,
    float_tile_bytes,
)
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout, UInt64Array

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Heads:
    """The shape of one attention layer."""

    q: int
    kv: int
    dim: int


@dataclass(frozen=True)
class OracleResult:
    """out [T, Hq, D], lse2 [T, Hq], log2 weights [T, Hq, n]: float64."""

    out: Float64
    lse2: Float64
    weights2: Float64


def attention_oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: NDArray[np.bool_]
) -> OracleResult:
    """Attend q [T, Hq, D] over k, v [n, Hkv, D] where visible [T, Hkv, n]."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    rows, heads, dim = queries.shape
    group = heads // keys.shape[1]
    out = np.zeros((rows, heads, dim))
    lse2 = np.full((rows, heads), -np.inf)
    weights2 = np.full((rows, heads, len(keys)), -np.inf)
    for row in range(rows):
        for head in range(heads):
            seen = visible[row, head // group]
            if not seen.any():
                continue
            scores = keys[seen, head // group] @ queries[row, head] / math.sqrt(dim)
            scores *= math.log2(math.e)
            top = scores.max()
            lse2[row, head] = top + np.log2(np.exp2(scores - top).sum())
            weights2[row, head, seen] = scores - lse2[row, head]
            out[row, head] = np.exp2(scores - lse2[row, head]) @ values[seen, head // group]
    return OracleResult(out, lse2, weights2)


@dataclass
class Request:
    """One context as written: k, v [n, Hkv, D] and its page slots in order."""

    k: torch.Tensor
    v: torch.Tensor
    slots: Int32Array


@dataclass
class World:
    """A pool of shuffled, poisoned tiles with requests in it; unwritten memory reads as NaN."""

    heads: Heads
    layout: Layout
    kv: LayerKV
    rng: np.random.Generator
    free: list[int]
    requests: list[Request] = field(default_factory=list)

    def tensor(self, *shape: int) -> torch.Tensor:
        """Return normal numbers in the model's dtype."""
        values = torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))
        return values.to(TORCH_DTYPE[self.layout])

    def add(
        self,
        ops: AttentionOps,
        length: int,
        *,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
    ) -> Request:
        """Write a context of `length` tokens through `ops.append`."""
        shape = (length, self.heads.kv, self.heads.dim)
        pages = -(-length // PAGE_TOKENS)
        slots = np.array([self.free.pop() for _ in range(pages)], np.int32)
        request = Request(
            self.tensor(*shape) if k is None else k, self.tensor(*shape) if v is None else v, slots
        )
        at = np.arange(length, dtype=np.int32)
        rows = slots[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS
        ops.append(self.kv, request.k, request.v, rows.astype(np.int32))
        self.requests.append(request)
        return request


def make_world(
    heads: Heads,
    layout: Layout,
    *,
    pages: int,
    seed: int = 0,
    layers: int = 2,
    layer: int = 1,
    device: str = "cpu",
) -> World:
    """Return an empty pool whose tiles lie in shuffled order."""
    rng = np.random.default_rng(seed)
    tile_bytes = float_tile_bytes(layout, heads.dim)
    tiles = pages * layers * heads.kv
    table = rng.permutation(tiles).astype(np.int32).reshape(pages, layers, heads.kv)
    memory = mmap.mmap(-1, tiles * tile_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8).fill_(0xFF)
    kv = LayerKV(buffer.to(device), table, tile_bytes, layer, heads.kv, heads.dim)
    return World(heads, layout, kv, rng, rng.permutation(pages).tolist())


def flat_plan(
    layout: Layout,
    parts: Sequence[tuple[Int32Array, Sequence[int]]],
    *,
    masks: UInt64Array | None = None,
    private_tiles: Int32Array | None = None,
) -> AttentionPlan:
    """Return a plan of one group per part: its page entries and the positions of its rows."""
    positions: list[int] = []
    groups: list[list[int]] = []
    runs: list[list[int]] = []
    pages: list[Int32Array] = []
    for slots, rows in parts:
        groups.append([len(positions), len(positions) + len(rows), len(runs), len(runs) + 1])
        runs.append([sum(len(p) for p in pages), len(slots), 0, int(layout)])
        pages.append(slots)
        positions.extend(rows)
    return AttentionPlan(
        np.array(positions, np.int32),
        np.array(groups, np.int32).reshape(-1, 4),
        np.array(runs, np.int32).reshape(-1, 4),
        np.concatenate(pages).astype(np.int32) if pages else np.zeros(0, np.int32),
        private_tiles,
        masks,
    )


def causal(heads: Heads, positions: Sequence[int], length: int) -> NDArray[np.bool_]:
    """Return visible [T, Hkv, n]: tokens at positions <= the row's."""
    seen = np.arange(length)[None, :] <= np.asarray(positions)[:, None]
    return np.repeat(seen[:, None, :], heads.kv, axis=1)


def tolerance(layout: Layout, exact: Float64) -> Float64:
    """Return each output's allowed error; bf16 adds its own rounding of the result."""
    top = np.abs(exact).max()
    if TORCH_DTYPE[layout] == torch.float32:
        return np.full(exact.shape, 3e-6 * top)
    allowed: Float64 = 2e-3 * top + np.abs(exact) * 2.0**-8
    return allowed


def check(world: World, got: Attended, exact: OracleResult) -> None:
    """Hold a result within the layout's tolerance of the exact one."""
    error = np.abs(got.out.double().numpy() - exact.out)
    allowed = tolerance(world.layout, exact.out)
    assert (error <= allowed).all(), f"worst {error.max():.2e}, allowed {allowed.max():.2e}"
    empty = np.isinf(exact.lse2)
    assert np.array_equal(np.isinf(got.lse2.numpy()), empty)
    assert np.abs(got.lse2.numpy()[~empty] - exact.lse2[~empty]).max(initial=0) <= 1e-3
