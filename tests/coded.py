"""Pools that hold coded pages and then pages in the model's dtype, with what they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from kvkeep.ops.codes import (
    CODE_BITS,
    SINK_TOKENS,
    Codes,
    pack_codes,
    pack_sinks,
    partition_channels,
    tile_bytes,
)
from kvkeep.ops.layout import STEP_TOKENS, TORCH_DTYPE, AttentionPlan, LayerKV, Run
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout
from tests.oracles import Heads

UNIT = 64
LAYERS, LAYER = 2, 1


class CodedPage(NamedTuple):
    """One page's codes [Hkv, ...] and, of the page at position 0, its sinks k, v [Hkv, 4, D]."""

    codes: Codes
    sinks: tuple[torch.Tensor, torch.Tensor] | None


@dataclass
class Context:
    """`coded` pages and then k, v [n, Hkv, D] in the model's dtype; all page slots in order."""

    layout: Layout
    coded: list[CodedPage]
    k: torch.Tensor
    v: torch.Tensor
    slots: Int32Array

    @property
    def coded_tokens(self) -> int:
        """Return the position at which the model's dtype begins."""
        return len(self.coded) * PAGE_TOKENS

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return self.coded_tokens + len(self.k)

    def runs(self, first_entry: int, model: Layout) -> list[Run]:
        """Return its runs, its page entries being at `first_entry` of the plan."""
        coded, pages = len(self.coded), len(self.slots)
        runs = [
            Run(first_entry, coded, 0, int(self.layout)),
            Run(first_entry + coded, pages - coded, self.coded_tokens, int(model)),
        ]
        return [run for run in runs if run.page_count]


@dataclass
class CodedWorld:
    """A pool in units of 64 bytes, its tiles of all sizes in any order, poisoned in between."""

    heads: Heads
    model: Layout
    kv: LayerKV
    rng: np.random.Generator
    contexts: list[Context] = field(default_factory=list)
    _end: int = 0
    _pages: int = 0

    def tensor(self, *shape: int) -> torch.Tensor:
        """Return normal numbers in the model's dtype."""
        values = torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))
        return values.to(TORCH_DTYPE[self.model])

    def add(
        self, layout: Layout, coded_pages: int, tail: int, codes: list[Codes] | None = None
    ) -> Context:
        """Write a context of random codes, or of the codes given, and `tail` more tokens."""
        assert coded_pages * PAGE_TOKENS % STEP_TOKENS == 0 or tail == 0
        heads, dim = self.heads.kv, self.heads.dim
        pages: list[CodedPage] = []
        slots: list[int] = []
        for i in range(coded_pages):
            codes_of = random_codes(self.rng, layout, heads, dim) if codes is None else codes[i]
            sinks = None
            if i == 0:
                k, v = self.tensor(2, heads, SINK_TOKENS, dim).bfloat16()
                sinks = (k, v)
            pages.append(CodedPage(codes_of, sinks))
            tiles = pack_codes(codes_of, layout)
            if sinks is not None:
                tiles = torch.cat([tiles, pack_sinks(*sinks)], 1)
            slots.append(self._place(tile_bytes(layout, dim, first=i == 0)))
            for head, tile in enumerate(tiles):
                begin = int(self.kv.tile_table[slots[-1], LAYER, head]) * UNIT
                self.kv.buffer[begin : begin + len(tile)] = tile
        size = tile_bytes(self.model, dim)
        slots += [self._place(size) for _ in range(-(-tail // PAGE_TOKENS))]
        k, v = self.tensor(2, tail, heads, dim)
        context = Context(layout, pages, k, v, np.array(slots, np.int32))
        at = np.arange(tail, dtype=np.int32)
        own = context.slots[coded_pages:]
        rows = own[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS if tail else at
        ReferenceAttention().append(self.kv, k, v, rows.astype(np.int32))
        self.contexts.append(context)
        return context

    def _place(self, size: int) -> int:
        """Return a fresh page slot whose tiles of `size` bytes lie behind a poisoned gap each."""
        page = self._pages
        for head in self.rng.permutation(self.heads.kv).tolist():
            self._end += 1
            self.kv.tile_table[page, LAYER, head] = self._end
            self._end += size // UNIT
        self._pages += 1
        assert self._pages <= len(self.kv.tile_table)
        assert self._end * UNIT <= self.kv.buffer.numel()
        return page


def make_coded_world(
    heads: Heads, model: Layout, *, pages: int, mebibytes: int = 8, seed: int = 0
) -> CodedWorld:
    """Return an empty pool."""
    table = np.full((pages, LAYERS, heads.kv), -1, np.int32)
    buffer = torch.full((mebibytes << 20,), 0xFF, dtype=torch.uint8)
    kv = LayerKV(buffer, table, UNIT, LAYER, heads.kv, heads.dim)
    return CodedWorld(heads, model, kv, np.random.default_rng(seed))


def random_codes(rng: np.random.Generator, layout: Layout, heads: int, dim: int) -> Codes:
    """Return codes of values about normal: scales of 1 / levels, some channels ten times larger."""
    bits = CODE_BITS[layout]
    parts = dim // partition_channels(dim)

    def codes(b: int) -> torch.Tensor:
        drawn = rng.integers(0, 1 << b, (heads, PAGE_TOKENS, dim), np.uint8)
        return torch.from_numpy(drawn)

    def near(top: float, *shape: int) -> torch.Tensor:
        drawn = rng.uniform(0.5, 1.5, (heads, *shape)).astype(np.float32)
        return (torch.from_numpy(drawn) * top).bfloat16()

    k_scale = near(3.5 / ((1 << bits.k) - 1), dim)
    k_scale[:, rng.integers(0, dim)] *= 10
    return Codes(
        codes(bits.k),
        k_scale,
        near(-1.75, dim),
        codes(bits.v),
        near(3.5 / ((1 << bits.v) - 1), parts, PAGE_TOKENS),
        near(-1.75, parts, PAGE_TOKENS),
    )


def coded_plan(
    world: CodedWorld, parts: list[tuple[Context, list[int]]], **arrays: np.ndarray
) -> AttentionPlan:
    """Return a plan of one group per part: a context and the positions of its rows."""
    positions: list[int] = []
    groups: list[list[int]] = []
    runs: list[Run] = []
    entries = 0
    for context, rows in parts:
        own = context.runs(entries, world.model)
        groups.append([len(positions), len(positions) + len(rows), len(runs), len(runs) + len(own)])
        runs += own
        entries += len(context.slots)
        positions.extend(rows)
    plan = AttentionPlan(
        np.array(positions, np.int32),
        np.array(groups, np.int32),
        np.array(runs, np.int32).reshape(-1, 4),
        np.concatenate([context.slots for context, _ in parts]).astype(np.int32),
    )
    return replace(plan, **arrays)
