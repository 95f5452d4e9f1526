"""One step's view of the cache, as the model's attention layers use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.cache.pool import TilePool
from kvkeep.cache.tiers import PageListener
from kvkeep.engine.turning import Turning
from kvkeep.errors import NonFiniteKV
from kvkeep.eviction.policy import Evictor
from kvkeep.ops.layout import AttentionOps, AttentionPlan, LayerKV, Observe, Run, chains
from kvkeep.quant.codec import Codec, KVShape, Place, values_of
from kvkeep.shield.policy import Shield, Transform
from kvkeep.types import PAGE_TOKENS, BatchGeometry, FloatArray, Int32Array, View
from kvkeep.watch import EvictState


@dataclass(frozen=True, slots=True)
class Closing:
    """A page completed in this step."""

    slot: int
    staged: int
    """The slot it was written in; -1 where it stays as it was written."""
    index: int
    """Its place in the view."""
    view: View


@dataclass(frozen=True, slots=True)
class StepKV:
    """Everything of a step that is the same for all layers."""

    geometry: BatchGeometry
    plan: AttentionPlan
    slots: Int32Array
    """[T] page slot * S + row to write; -1 where K and V are already stored."""
    closing: tuple[Closing, ...]


@dataclass(frozen=True, slots=True)
class Techniques:
    """The real or null object of each seam that works inside a step."""

    codec: Codec
    shield: Shield
    evictor: Evictor


class BatchKV:
    """Appends and attends one step's rows, layer by layer."""

    def __init__(
        self,
        step: StepKV,
        pool: TilePool,
        layers: Sequence[LayerKV],
        ops: AttentionOps,
        techniques: Techniques,
        shape: KVShape,
        turning: Turning,
        transform: Transform,
        listeners: Sequence[PageListener] = (),
    ) -> None:
        self._step = step
        self._pool = pool
        self._layers = layers
        self._ops = ops
        self._codec = techniques.codec
        self._transform = transform
        self._evictor = techniques.evictor
        self._shape = shape
        self._turning = turning
        self._listeners = listeners
        self._observe = self._thresholds()
        self._watched_runs = self._watched()
        self.encoded = 0
        """Pages encoded so far, counted per layer."""
        self.failed: dict[int, NonFiniteKV] = {}
        """By view: why its pages could not be encoded."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [T, Hkv, D] of the step's rows, then encode and announce what closed."""
        stored = self._transform.transform
        keys = self._turning.keys(stored(k, "k", layer))
        self._ops.append(self._layers[layer], keys, stored(v, "v", layer), self._step.slots)
        for page in self._step.closing:
            if page.staged >= 0 and not self._encode(page, layer):
                continue
            for listener in self._listeners:
                listener.layer_closed(page.slot, layer)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Return attention [T, Hq, D] of the step's rows over their views."""
        queries = self._turning.queries(self._transform.transform(q, "q", layer))
        observe = self._observe[layer % len(self._observe)] if self._observe else None
        attended = self._ops.attend(queries, self._layers[layer], self._step.plan, observe)
        if attended.stamps is not None:
            self._hand_out(layer, attended.stamps)
        return self._transform.restore(attended.out, layer)

    def finish(self) -> None:
        """Let the evictor decide what stays live; taints a view whose masks changed."""
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

    def _encode(self, page: Closing, layer: int) -> bool:
        """Write the codec's tiles of one staged page and layer.

        False where a value can't be stored: that request fails, and the step goes on.
        """
        if page.view.id in self.failed:
            return False
        k, v = values_of(self._pool.tiles_there(page.staged, layer), self._shape)
        try:
            tiles = self._codec.encode(k, v, Place(layer, page.index == 0))
        except NonFiniteKV as error:
            self.failed[page.view.id] = error.in_layer(layer)
            page.view.taint(page.index * PAGE_TOKENS)
            return False
        self._pool.write_tiles(page.slot, layer, tiles)
        self.encoded += 1
        return True

    def _thresholds(self) -> list[Observe]:
        """Return the thresholds of observed rows, once for all layers or for each; or nothing."""
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
        return [Observe(thresholds, stamps=True) for thresholds in by_layer]

    def _watched(self) -> list[tuple[EvictState, list[Run]]]:
        """Return whose rows are observed, and what they see; a view's rows may see several sets."""
        if not self._observe:
            return []
        observed: NDArray[np.bool_] = np.isfinite(self._observe[0].log2_thresholds[:, 0])
        owners = {
            row: segment.view.evict
            for segment in self._step.geometry.segments
            for row in range(segment.first_row, segment.first_row + segment.num_rows)
        }
        found = []
        for rows, runs in chains(self._step.plan):
            state = owners[rows[0]] if observed[rows].any() else None
            if state is not None:
                found.append((state, runs))
        return found

    def _hand_out(self, layer: int, stamps: Int32Array) -> None:
        """Give each observed view what its rows looked at; nobody else looked there."""
        for state, runs in self._watched_runs:
            own = [stamps[run.page_begin : run.page_begin + run.page_count] for run in runs]
            self._evictor.observe(state, layer, own[0] if len(own) == 1 else np.concatenate(own))
