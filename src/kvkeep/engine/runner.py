"""Run one step's work through the model: build the batch's KV, forward, hand back logits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvkeep.attention.planner import AttentionPlanner
from kvkeep.cache.packing import Packing
from kvkeep.cache.pool import TilePool
from kvkeep.cache.tiers import ClosedPage, OpenRows, PageListener
from kvkeep.engine.apart import RowsApart
from kvkeep.engine.api import EvictStats, GenerateRequest
from kvkeep.engine.backend import Upload
from kvkeep.engine.batch_kv import BatchKV, Closing, Leaving, StepKV, Techniques
from kvkeep.engine.evicted import EvictCounts
from kvkeep.engine.handing import hands_over
from kvkeep.engine.opened import Opener
from kvkeep.engine.packer import Packer
from kvkeep.engine.rows import RowsToCome, RowStore, slots_of
from kvkeep.engine.staging import Staging
from kvkeep.engine.turning import Turning
from kvkeep.engine.work import Work
from kvkeep.errors import EngineError, NonFiniteKV
from kvkeep.models.host import HostedModel
from kvkeep.ops.layout import TORCH_DTYPE, AttentionPlan, Ops, float_tile_bytes
from kvkeep.quant.codec import KVShape
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Int32Array, Segment, View
from kvkeep.watch import Watch


class Stepped(NamedTuple):
    """What a step produced."""

    logits: torch.Tensor
    """[R, V] for the work items that sample, in their order, after the rows of `prompt_rows`;
    shadows' come last.
    """
    prompt_rows: int
    """Leading rows of `logits` that belong to prompts asked for log-probabilities."""
    model_s: float
    """Seconds inside the model's forward."""
    failed: Mapping[int, EngineError]
    """By view: what it computed can't be stored, and is worth nothing from there on."""
    changed: frozenset[int]
    """Tiles in memory that somebody else changed: what attended to them is worth nothing."""


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What a runner joins."""

    model: HostedModel
    pool: TilePool
    ops: Ops
    upload: Upload
    planner: AttentionPlanner
    techniques: Techniques
    shape: KVShape
    listeners: tuple[PageListener, ...] = ()


@dataclass(slots=True)
class Read:
    """What the steps' plans read, over all layers, and what was encoded."""

    tree_steps: int = 0
    planned_bytes: int = 0
    flat_bytes: int = 0
    """If every request had read its own."""
    encoded_pages: int = 0


class ModelRunner:
    """Turns scheduled work into logits."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._spec = parts.techniques.codec.page_spec(parts.shape)
        self._opener = Opener(parts.pool, parts.ops.attention)
        self._staging = Staging(parts.pool)
        codec = parts.techniques.codec
        self._rows = RowStore(parts.pool, parts.ops.attention, codec, parts.shape)
        self._coded = None if self._spec.window_tokens is None else codec.name
        plain_bytes = float_tile_bytes(parts.shape.layout, parts.shape.head_dim)
        self._page_bytes = (self._spec.page_bytes, plain_bytes * self._spec.tiles_per_page)
        """Coded, and in the model's dtype."""
        self._turning = Turning(
            parts.ops, parts.techniques.codec.rotation(parts.shape), TORCH_DTYPE[parts.shape.layout]
        )
        self._transform = parts.techniques.shield.on(parts.model.spec.heads, parts.ops)
        self.read = Read()
        self.packer = Packer(parts.shape)
        self._evicted = EvictCounts()

    @property
    def kernels(self) -> Ops:
        """Return the backend in use."""
        return self._parts.ops

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of packed weights read to compute one row."""
        return self._parts.model.spec.weight_bytes

    @property
    def num_heads(self) -> int:
        """Return the model's query heads."""
        return self._parts.model.spec.num_heads

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> Stepped:
        """Compute K, V and logits of the work's rows; afterwards their views hold them."""
        parts = self._parts
        begun = time.monotonic()
        for item in work:
            item.sequence.request.step_begins(begun)
        step = self._build(work)
        readable = self._opener.open(step.plan)
        kv = BatchKV(
            step, parts.pool, readable, parts.ops, parts.techniques, self._rows, self._turning,
            self._transform, parts.listeners,
        )  # fmt: skip
        ids = np.concatenate([w.sequence.tokens.ids()[w.start : w.start + w.count] for w in work])
        rows, prompt_rows = _logit_rows(work)
        positions = step.plan.row_positions
        begun = time.perf_counter()
        wide = ids.astype(np.int64)
        ids_there, positions_there, rows_there = parts.upload(
            [wide, positions.astype(np.int64), rows]
        )
        try:
            logits = parts.model.forward(ids_there, positions_there, kv, rows_there)
        finally:
            readable.close()
            ids.fill(0)  # numpy keeps small arrays' memory as it was
            wide.fill(0)
        model_s = time.perf_counter() - begun
        asked = [
            segment
            for segment, item in zip(step.geometry.segments, work, strict=True)
            if not item.sequence.request.is_probe
        ]
        self._evicted.take(asked)
        kv.finish()
        self._evicted.decided(asked)
        for item in work:
            item.view.length = max(item.view.length, item.start + item.count)
            request = item.sequence.request
            request.moments.encode_s += kv.encode_s.pop(request.spec.id, 0.0)
        self._staging.drop_encoded(step.geometry)
        self.read.encoded_pages += kv.encoded // parts.shape.num_layers
        return Stepped(logits, prompt_rows, model_s, kv.failures(), readable.changed)

    def watch(self, spec: GenerateRequest) -> Watch | None:
        """Return when a request's rows are observed and its tokens evicted; None: never."""
        return self._parts.techniques.evictor.watch(len(spec.prompt_ids))

    def go_on(self, view: View, rows: RowsToCome) -> None:
        """Let a view that ends before another engine's rows go on behind them, if they are there.

        It must have room for them. Where a value can't be stored it stays as it was.
        """
        if rows.state != "there" or view.length != rows.first:
            return
        coded = self._coded == view.tag.codec
        staged, staged_from = self._staging.pages_of(view, rows.end, coded=coded)
        try:
            slots = slots_of(staged, staged_from, rows.first, rows.end)
            self._rows.write(view, rows.take(), slots)
        except NonFiniteKV:
            return
        view.length = rows.end

    def fork(self, view: View, twin: View) -> None:
        """Let a fork see the recent tokens of its source."""
        self._staging.fork(view, twin)

    def pack(self, view: View, packing: Packing) -> None:
        """Give back what a view's evicted tokens took; see `Packer.pack`."""
        self.packer.pack(view, packing)

    def evict_stats(self, unpacked: int) -> EvictStats:
        """Return what eviction has done; `unpacked`: times there was no room to pack."""
        packer = self.packer
        return self._evicted.stats(packer.packed_views, packer.freed_bytes, unpacked)

    def tiles_of(self, view: View) -> Int32Array:
        """Return the tiles of a view's pages and of its own, whatever they are."""
        return self._opener.tiles_of(view)

    def forget(self, view: View) -> None:
        """Drop what planner and staging remember of a view that ended."""
        self._parts.planner.forget(view)
        self._staging.forget(view)

    def _build(self, work: Sequence[Work]) -> StepKV:
        segments: list[Segment] = []
        slots: list[Int32Array] = []
        closing: list[Closing] = []
        apart: list[RowsApart] = []
        leaving: list[Leaving] = []
        row = 0
        for item in work:
            view, request = item.view, item.sequence.request
            if view.evict is None and request.watch is not None and not item.shadow:
                view.evict = self._parts.techniques.evictor.new_state(
                    self._spec, request.watch, request.spec.protected
                )
            coded = self._coded == view.tag.codec
            end = item.start + item.count
            staged, staged_from = self._staging.pages_of(view, end, coded=coded)
            segments.append(Segment(view, row, item.count, item.start, staged, staged_from, coded))
            target = slots_of(staged, staged_from, item.start, end)
            target[: max(0, view.length - item.start)] = -1
            slots.append(target)
            for page in (
                () if item.shadow else range(view.length // PAGE_TOKENS, end // PAGE_TOKENS)
            ):
                slot, written = int(view.slots[page]), int(staged[page - staged_from])
                closed = ClosedPage(request.spec.id, view, page, slot)
                whole = page * PAGE_TOKENS >= max(item.start, view.length)
                begun = row + page * PAGE_TOKENS - item.start if whole else -1
                closing.append(Closing(closed, written if written != slot else -1, begun))
            if view.apart:
                assert request.part is not None
                apart.append(RowsApart(view, row, item.count, request.part))
            leaving += self._leaving(item, row, staged, staged_from)
            row += item.count
        geometry = BatchGeometry(
            tuple(segments), row, self._parts.shape.layout, self._spec.layout,
            self._spec.window_tokens,
        )  # fmt: skip
        plan = self._parts.planner.plan(geometry)
        self._count(geometry, plan)
        return StepKV(
            geometry, plan, np.concatenate(slots), tuple(closing), tuple(apart), tuple(leaving)
        )

    def _leaving(self, item: Work, row: int, staged: Int32Array, staged_from: int) -> list[Leaving]:
        """Return the rows behind the last whole block of a prompt that another engine answers.

        Of one that ends in this step; none where tokens may be evicted: only who attends to all of
        them can tell which.
        """
        request, view, end = item.sequence.request, item.view, item.sequence.prompt_len
        ends = item.start < end <= item.start + item.count
        if not (ends and hands_over(request)) or item.shadow or request.watch is not None:
            return []
        first = end - end % self._block_tokens(view)
        pages = staged[first // PAGE_TOKENS - staged_from :]
        begun = row + first - item.start if first >= max(item.start, view.length) else -1
        found = OpenRows(request.spec.id, view.tag, end - first, pages)
        return [Leaving(found, begun)] if end > first else []

    def _block_tokens(self, view: View) -> int:
        """Return how many tokens are found again at a time in pages of a view's form."""
        return PAGE_TOKENS * (self._spec.block_pages if self._coded == view.tag.codec else 1)

    def _count(self, geometry: BatchGeometry, plan: AttentionPlan) -> None:
        """Count what a step's plan reads."""
        coded_bytes, plain_bytes = self._page_bytes
        self.read.tree_steps += plan.parents is not None
        coded = plan.runs[:, 3] != int(geometry.layout)
        sizes = np.where(coded, coded_bytes, plain_bytes)
        self.read.planned_bytes += int((plan.runs[:, 1] * sizes).sum())
        for segment in geometry.segments:
            end = segment.first_position + segment.num_rows
            first, apart = geometry.coded_pages(segment, end - 1), segment.view.apart
            rest = -(-end // PAGE_TOKENS) - max(first, apart)
            first = max(first - apart, 0)
            self.read.flat_bytes += first * coded_bytes + rest * plain_bytes


def _logit_rows(work: Sequence[Work]) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], int]:
    """Return the rows whose logits are needed, prompts' first, and how many are prompts'."""
    prompt: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    last: list[int] = []
    row = 0
    for item in work:
        end = min(item.start + item.count, item.sequence.prompt_len)
        asked = item.sequence.output.prompt is not None and not item.shadow
        if asked and end > item.start:
            prompt.append(np.arange(row, row + end - item.start))
        if item.samples:
            last.append(row + item.count - 1)
        row += item.count
    rows = np.concatenate([*prompt, np.array(last, np.int64)])
    return rows.astype(np.int64), len(rows) - len(last)
