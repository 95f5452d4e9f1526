"""One step's view of the cache, as the model's attention layers use it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.cache.pool import TilePool
from kvkeep.cache.tiers import ClosedPage, OpenRows, PageListener
from kvkeep.engine.apart import Gathering, RowsApart
from kvkeep.engine.opened import Readable
from kvkeep.engine.rows import NewRows, RowStore
from kvkeep.engine.turning import Turning
from kvkeep.errors import EngineError, NonFiniteKV
from kvkeep.eviction.policy import Evictor, Look
from kvkeep.ops.layout import (
    Attended,
    AttentionPlan,
    Observe,
    Ops,
    Run,
    chains,
)
from kvkeep.quant.codec import Codec, Place
from kvkeep.shield.policy import Shield, Transform
from kvkeep.types import PAGE_TOKENS, BatchGeometry, FloatArray, Int32Array
from kvkeep.watch import EvictState

N = TypeVar("N", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Closing:
    """A page completed in this step."""

    page: ClosedPage
    staged: int
    """The slot it was written in; -1 where it stays as it was written."""
    row: int = -1
    """The step's row that holds its first token; -1 where earlier steps stored some of it."""


class Leaving(NamedTuple):
    """What lies behind the last whole block of a prompt that ends in this step."""

    rows: OpenRows
    row: int
    """The step's row that holds the first; -1 where earlier steps stored some."""


@dataclass(frozen=True, slots=True)
class StepKV:
    """Everything of a step that is the same for all layers."""

    geometry: BatchGeometry
    plan: AttentionPlan
    slots: Int32Array
    """[T] page slot * S + row to write; -1 where K and V are already stored."""
    closing: tuple[Closing, ...]
    apart: tuple[RowsApart, ...] = ()
    """Rows whose views begin in other workers."""
    leaving: tuple[Leaving, ...] = ()
    """Of prompts that other engines answer."""


@dataclass(frozen=True, slots=True)
class Techniques:
    """The real or null object of each seam that works inside a step."""

    codec: Codec
    shield: Shield
    evictor: Evictor


class _Watched(NamedTuple):
    """Rows that are observed and what they see; a view's rows may see several sets."""

    state: EvictState
    runs: list[Run]
    position: int
    """Of the only one; where a step has several such rows of a view, stamps are asked for."""


class BatchKV:
    """Appends and attends one step's rows, layer by layer."""

    def __init__(
        self,
        step: StepKV,
        pool: TilePool,
        readable: Readable,
        kernels: Ops,
        techniques: Techniques,
        rows: RowStore,
        turning: Turning,
        transform: Transform,
        listeners: Sequence[PageListener] = (),
    ) -> None:
        self._step = step
        self._pool = pool
        self._readable = readable
        self._ops = kernels.attention
        self._gathering = Gathering(step.apart, kernels.parts) if step.apart else None
        self._rows = rows
        self._transform = transform
        self._evictor = techniques.evictor
        self._turning = turning
        self._listeners = listeners
        thresholds = self._thresholds()
        self._watched, several = self._watch(thresholds)
        self._observe = [Observe(one, stamps=several) for one in thresholds]
        """Once for all layers or for each; empty: nobody is observed."""
        self.encoded = 0
        """Pages encoded so far, counted per layer."""
        self.encode_s: dict[str, float] = {}
        """By request: what that took."""
        self.failed: dict[int, NonFiniteKV] = {}
        """By view: why its pages could not be encoded."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [T, Hkv, D] of the step's rows, then encode and announce what is whole."""
        stored = self._transform.transform
        new = NewRows(self._turning.keys(stored(k, "k", layer)), stored(v, "v", layer))
        into = self._readable.layers[layer]
        self._ops.append(into, new.k, new.v, self._step.slots)
        for closing in self._step.closing:
            if closing.staged >= 0 and not self._encode(closing, layer, new):
                continue
            for listener in self._listeners:
                listener.layer_closed(closing.page, layer)
        for rows, begun in self._step.leaving:
            own = begun >= 0 and self._rows.stores(new)
            data = new.told(begun, rows.num_rows) if own else self._rows.read(rows, layer)
            for listener in self._listeners:
                listener.rows_stored(rows, layer, data)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Return attention [T, Hq, D] of the step's rows over their views."""
        queries = self._turning.queries(self._transform.transform(q, "q", layer))
        observe = self._observe[layer % len(self._observe)] if self._observe else None
        if self._gathering is None:
            attended = self._readable.attend(queries, layer, observe)
        else:
            kv = self._readable.layers[layer]
            attended = self._gathering.attend(layer, queries, kv, self._step.plan, observe)
        if observe is not None:
            self._hand_out(layer, attended)
        return self._transform.restore(attended.out, layer)

    def failures(self) -> dict[int, EngineError]:
        """Return by view why its rows are worth nothing."""
        return {**self.failed, **({} if self._gathering is None else self._gathering.lost)}

    def finish(self) -> None:
        """Let the evictor decide what stays live; taints a view whose masks changed."""
        for closing in self._step.closing:
            if closing.staged < 0:
                self._pool.seal(closing.page.slot)
        for segment in self._step.geometry.segments:
            view = segment.view
            if view.evict is None:
                continue
            last = segment.first_position + segment.num_rows - 1
            masks = self._evictor.keep(view.evict, last)
            if masks.size and np.any(masks != np.iinfo(np.uint64).max):
                view.taint(last + 1)
            view.evict.pending |= masks is not view.evict.masks
            view.evict.masks = masks

    def _encode(self, closing: Closing, layer: int, new: NewRows) -> bool:
        """Write the codec's tiles of one staged page and layer, from the step's rows if it can.

        False where a value can't be stored: that request fails, and the step goes on.
        """
        page = closing.page
        if page.view.id in self.failed:
            return False
        begun, place = time.perf_counter(), Place(layer, page.index == 0)
        try:
            if closing.row >= 0 and self._rows.stores(new):
                self._rows.encode_new(new, closing.row, page.slot, place)
            else:
                self._rows.encode(closing.staged, page.slot, place)
        except NonFiniteKV as error:
            self.failed[page.view.id] = error.in_layer(layer)
            page.view.taint(page.index * PAGE_TOKENS)
            return False
        self.encoded += 1
        took = time.perf_counter() - begun
        self.encode_s[page.request_id] = self.encode_s.get(page.request_id, 0.0) + took
        return True

    def _thresholds(self) -> list[FloatArray]:
        """Return thresholds [T, Hkv or 1], once for all layers or for each; or nothing."""
        found: dict[int, FloatArray] = {}
        for segment in self._step.geometry.segments:
            state, begin = segment.view.evict, segment.first_position
            if state is None:
                continue
            for position in range(max(begin, state.watch.first), begin + segment.num_rows):
                row = segment.first_row + position - begin
                found[row] = self._evictor.thresholds(state, position)
        if not any(np.isfinite(one).all() for one in found.values()):
            return []
        layers, heads = np.broadcast_shapes(*(one.shape for one in found.values()))
        by_layer = np.full((layers, self._step.geometry.num_rows, heads), np.inf, np.float32)
        for row, one in found.items():
            by_layer[:, row] = one
        return list(by_layer)

    def _watch(self, thresholds: list[FloatArray]) -> tuple[list[_Watched], bool]:
        """Return whose rows are observed, and whether several rows of one view are."""
        if not thresholds:
            return [], False
        observed: NDArray[np.bool_] = np.isfinite(thresholds[0][:, 0])
        owners = {
            row: segment.view.evict
            for segment in self._step.geometry.segments
            for row in range(segment.first_row, segment.first_row + segment.num_rows)
        }
        found, several = [], False
        for rows, runs in chains(self._step.plan):
            state, seen = owners[rows[0]], [row for row in rows if observed[row]]
            if state is not None and seen:
                position = int(self._step.plan.row_positions[seen[-1]])
                several |= len(seen) > 1
                found.append(_Watched(state, runs, position))
        return found, several

    def _hand_out(self, layer: int, attended: Attended) -> None:
        """Give each observed view what its rows looked at; nobody else looked there."""
        hits, stamps = attended.hits, attended.stamps
        for one in self._watched:
            if stamps is not None:
                self._evictor.observe(one.state, layer, _of_runs(stamps, one.runs))
            elif hits is not None:
                look = Look(one.position, _of_runs(hits, one.runs))
                self._evictor.observe(one.state, layer, look)


def _of_runs(entries: NDArray[N], runs: Sequence[Run]) -> NDArray[N]:
    """Return what belongs to the pages of some runs."""
    own = [entries[run.page_begin : run.page_begin + run.page_count] for run in runs]
    return own[0] if len(own) == 1 else np.concatenate(own)
