"""A toy real object of each seam: small, but with an effect a null object does not have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvkeep.attention.planner import FlatPlanner
from kvkeep.cache.tiers import Install, Read
from kvkeep.eviction.policy import Look, empty_state
from kvkeep.ops.layout import AttentionPlan, Heads, Ops, WeightFold
from kvkeep.quant.codec import Float, KVShape, Place, Tiles
from kvkeep.sealing import SealContext
from kvkeep.sharing.policy import Access
from kvkeep.shield.policy import Role, Transform
from kvkeep.types import (
    PAGE_TOKENS,
    BatchGeometry,
    EpochDelta,
    FloatArray,
    Int32Array,
    PageSpec,
    UInt64Array,
    View,
)
from kvkeep.watch import EvictState, Spans, Watch


class WindowEvictor:
    """Keeps the first four tokens and a window of the latest; counts how often it observed."""

    def __init__(self, window_tokens: int) -> None:
        self._window = window_tokens
        self.observed = 0

    def watch(self, prompt_tokens: int) -> Watch:
        return Watch(prompt_tokens, prompt_tokens)

    def new_state(self, spec: PageSpec, watch: Watch, protected: Spans = ()) -> EvictState:
        return empty_state(spec, watch, protected)

    def thresholds(self, state: EvictState, position: int) -> FloatArray:
        return np.full((1, 1), -np.log2(position + 1), np.float32)

    def observe(self, state: EvictState, layer: int, looks: Int32Array | Look) -> None:
        last = looks.position if isinstance(looks, Look) else looks.max()
        assert last >= state.watch.first, "some token always has at least the mean weight"
        assert not isinstance(looks, Look) or looks.hits.any()
        self.observed += 1

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        if not state.watch.decides(position):
            return state.masks
        pages = position // PAGE_TOKENS + 2
        at = np.arange(pages * PAGE_TOKENS)
        live = (at < 4) | (at > position - self._window)
        bits = (
            live.reshape(pages, PAGE_TOKENS).astype(np.uint64) << np.arange(64, dtype=np.uint64)
        ).sum(1, dtype=np.uint64)
        shape = (pages, *state.masks.shape[1:])
        return np.ascontiguousarray(np.broadcast_to(bits[:, None, None], shape))


class PromoteOffered:
    """Makes public, at each epoch's end, every chain that was offered."""

    at_once = False
    by_scope = False

    def __init__(self) -> None:
        self._offered: dict[bytes, None] = {}
        self._public: set[bytes] = set()
        self._epoch = 0

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        return next((i for i, h in enumerate(chain) if h not in self._public), len(chain))

    def offer(self, chain: Sequence[bytes], tenant: str) -> None:
        self._offered.update(dict.fromkeys(chain))

    def observe(self, access: Access) -> None:
        return

    def end_epoch(self, now: float) -> EpochDelta:
        promoted, self._offered = tuple(self._offered), {}
        self._public.update(promoted)
        self._epoch += 1
        return EpochDelta(self._epoch, promoted)

    def forget(self, tenant: str) -> int:
        return 0


class MirrorShield:
    """Stores keys and values with their dims in reverse order."""

    name = "mirror"

    def folds(self, heads: Heads) -> tuple[WeightFold, ...]:
        return ()

    def on(self, heads: Heads, ops: Ops) -> Transform:
        return self

    def transform(self, x: torch.Tensor, role: Role, layer: int) -> torch.Tensor:
        return x.flip(-1)

    def restore(self, out: torch.Tensor, layer: int) -> torch.Tensor:
        return out.flip(-1)


class EightBit(Float):
    """Rounds each tile to 255 levels; stored in the float layout."""

    name = "eight-bit"

    def __init__(self, window_tokens: int = 128) -> None:
        self._window_tokens = window_tokens

    def page_spec(self, shape: KVShape) -> PageSpec:
        spec = super().page_spec(shape)
        return PageSpec(
            layout=spec.layout,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            tile_bytes=spec.tile_bytes,
            window_tokens=self._window_tokens,
        )

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        return super().encode(_round(k), _round(v), place)


def _round(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    scale = wide.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-9) / 127
    return ((wide / scale).round() * scale).to(x.dtype)


class RowPlanner:
    """One group per query row: as little shared as can be, and the same bits."""

    def __init__(self) -> None:
        self._flat = FlatPlanner()
        self.forgotten = 0

    def plan(self, geometry: BatchGeometry) -> AttentionPlan:
        flat = self._flat.plan(geometry)
        rows = [
            (row, row + 1, run_begin, run_end)
            for begin, end, run_begin, run_end in flat.groups.tolist()
            for row in range(begin, end)
        ]
        return AttentionPlan(
            flat.row_positions, np.array(rows, np.int32), flat.runs, flat.pages, None, flat.masks
        )

    def forget(self, view: View) -> None:
        self.forgotten += 1


class KeptPages:
    """The half of a tier that keeps pages in memory, copied at once."""

    def __init__(self) -> None:
        self.kept: dict[SealContext, list[bytes]] = {}

    def holds(self, context: SealContext) -> bool:
        return context in self.kept

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> None:
        page = memoryview(bytearray(sum(layer_bytes)))
        read(page)
        ends = list(itertools.accumulate(layer_bytes, initial=0))
        self.kept[context] = [bytes(page[at:end]) for at, end in itertools.pairwise(ends)]

    def forget(self, owner: str) -> int:
        mine = [context for context in self.kept if context.owner == owner]
        for context in mine:
            del self.kept[context]
        return len(mine)


class DelayedTier(KeptPages):
    """Answers fetches only after some polls."""

    def __init__(self, polls: int, *, fail: bool = False) -> None:
        super().__init__()
        self._polls = polls
        self._fail = fail
        self._due: list[tuple[int, Callable[[], None]]] = []
        self._now = 0
        self.fetched = 0

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        def deliver() -> None:
            if not self._fail:
                for layer, data in enumerate(self.kept[context]):
                    install(layer, data)
            self.fetched += 1
            done(not self._fail)

        self._due.append((self._now + self._polls, deliver))

    def poll(self) -> None:
        self._now += 1
        due = [call for at, call in self._due if at <= self._now]
        self._due = [(at, call) for at, call in self._due if at > self._now]
        for call in due:
            call()

    def lose_first(self) -> None:
        """Lose the page that was stored first: a chain's last, since leaves are evicted first."""
        del self.kept[next(iter(self.kept))]
