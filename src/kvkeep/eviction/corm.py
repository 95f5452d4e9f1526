"""CORM: a head forgets what none of its recent queries gave more than its share (2404.15949).

A token is important to a query that has seen t tokens if its weight is at least c / t. A KV head
drops, for good, a token that was important to no query of its group among the last w, unless it is
one of the r most recent ones. How much stays is an outcome, not a budget.

The published form keeps w rows of bits per head. "No bit among the last w" is "last hit w or more
positions ago", so one stamp per token says the same (derived; compared bit for bit in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvkeep.errors import ConfigError
from kvkeep.eviction.calibration import HeadRule
from kvkeep.eviction.policy import Look, empty_state, positions
from kvkeep.types import PAGE_TOKENS, FloatArray, Int32Array, PageSpec, UInt64Array
from kvkeep.watch import EvictState, Spans, Watch

NEVER: Final = -(1 << 30)
"""The stamp of a token that no query has looked at."""

FOREVER: Final = 1 << 30
"""The stamp of a protected token."""

_SLACK: Final = 2e-5
"""In log2, towards keeping: weights that are equal to the threshold but for rounding count."""

_MAX_TOKENS: Final = 1 << 20
_MAX_WEIGHT: Final = 1024.0
_FIRST: Final = 1 << 60
_MAX_SPREAD: Final = 64
_FLOOR: Final = 0.2
"""Of the mean head's tokens, what a capped head keeps at least (AdaKV's safeguard)."""

Birth = Literal["unseen", "seen"]
"""Whether a new token counts as looked at by its own query, if that is observed."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CormOptions:
    """The rule's parameters, in tokens unless said otherwise."""

    window: int = 256
    """w: a token stays while one of so many latest queries found it important."""
    prompt_rows: int | None = None
    """Of a prompt, so many last queries are observed before its end is decided on; None: w."""
    recent: int = 256
    """r: so many latest tokens stay in any case."""
    weight: float = 1.0
    """c: a token is important from c times the mean weight on."""
    most: float = 1.0
    """No more of a row's weight is ever asked for, where c / t would be."""
    spread: int = 0
    """So many tokens after an important one count as important with it."""
    birth: Birth = "unseen"
    sinks: int = 4
    """Leading tokens that stay for good."""
    cap: int | None = None
    """Live tokens of a layer's KV head, unless more are protected; None: what the rule keeps."""
    observe_every: int = 1
    """After the prompt, one query in so many is observed."""
    decide_every: int = 1
    """After the prompt, tokens are dropped when so many more have been seen."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("window", self.window, 1),
            ("recent", self.recent, 1),
            ("sinks", self.sinks, 0),
            ("observe_every", self.observe_every, 1),
            ("decide_every", self.decide_every, 1),
        ):
            if not least <= value <= _MAX_TOKENS:
                raise ConfigError(
                    f"evict_{name} is {value}; give a number from {least} to {_MAX_TOKENS}"
                )
        if not 0 < self.weight <= _MAX_WEIGHT:
            raise ConfigError(
                f"evict_weight is {self.weight}; give a number above 0, {_MAX_WEIGHT:g} at most"
            )
        if not 0 < self.most <= 1:
            raise ConfigError(f"evict_most is {self.most}; give a number above 0, 1 at most")
        if self.prompt_rows is not None and not 1 <= self.prompt_rows <= self.window:
            raise ConfigError(
                f"evict_prompt_rows is {self.prompt_rows}; give a number from 1 to evict_window,"
                f" {self.window}"
            )
        if not 0 <= self.spread <= _MAX_SPREAD:
            raise ConfigError(
                f"evict_spread is {self.spread}; give a number from 0 to {_MAX_SPREAD}"
            )
        if self.observe_every > self.window:
            raise ConfigError(
                f"evict_observe_every is {self.observe_every}: no query of a window of"
                f" {self.window} might be observed; lower it or raise evict_window"
            )
        if self.cap is not None and self.cap < self.sinks + self.recent:
            raise ConfigError(
                f"evict_cap is {self.cap}; it must hold the {self.sinks} first and"
                f" {self.recent} latest tokens: raise it to {self.sinks + self.recent} or more,"
                " or lower evict_recent"
            )


PRESETS: Final = {
    "corm-paper": CormOptions(),
    "corm": CormOptions(
        window=512,
        prompt_rows=32,
        recent=64,
        weight=192.0,
        most=0.5,
        spread=20,
        birth="seen",
        decide_every=16,
    ),
}
"""What is published, and what was chosen on development contexts of `kvkeep bench eviction`."""


def _named(options: CormOptions, heads: Sequence[Sequence[HeadRule]] | None) -> str:
    values = [f"{field.name} {getattr(options, field.name)}" for field in fields(options)]
    if heads is not None:
        raw = msgspec.json.encode([[(one.window, one.weight) for one in layer] for layer in heads])
        values.append(f"heads {blake2b(raw, digest_size=8).hexdigest()}")
    return ", ".join(values)


class Corm:
    """The evictor; all state is the view's."""

    def __init__(
        self, options: CormOptions, heads: Sequence[Sequence[HeadRule]] | None = None
    ) -> None:
        """`heads` [L][Hkv]: windows and weights that stand for those of the options."""
        self.options = options
        self.rule = _named(options, heads)
        """Its values by name, and which measured heads stand for some of them."""
        own = heads or [[HeadRule(window=options.window, weight=options.weight)]]
        self._windows = np.array([[[one.window] for one in layer] for layer in own], np.int32)[
            :, None
        ]
        """[L or 1, 1, Hkv or 1, 1]"""
        if options.observe_every > self._windows.min():
            raise ConfigError(
                f"evict_observe_every is {options.observe_every}: a head looks at"
                f" {self._windows.min()} queries; lower it"
            )
        self._rows = int(self._windows.max())
        if heads is None and options.prompt_rows is not None:
            self._rows = options.prompt_rows
        self._log2_weights = np.log2([[one.weight for one in layer] for layer in own])

    def watch(self, prompt_tokens: int) -> Watch:
        """Watch a prompt's last rows and every later one.

        Of a shorter prompt none: nothing could go at its end, and its pages may be reused.
        """
        own, rows = self.options, self._rows
        first = prompt_tokens - rows if prompt_tokens >= rows else prompt_tokens
        recent = max(own.recent, rows) if own.birth == "seen" else own.recent
        return Watch(prompt_tokens, first, own.decide_every, recent)

    def new_state(self, spec: PageSpec, watch: Watch, protected: Spans = ()) -> EvictState:
        """Return the state of a view that nobody has looked at."""
        return empty_state(spec, watch, ((0, self.options.sinks), *protected))

    def thresholds(self, state: EvictState, position: int) -> FloatArray:
        """Return log2 of c / t or `most`, less a rounding error; t counts all tokens seen."""
        watch, seen = state.watch, position + 1
        skipped = seen > watch.prompt_tokens and seen % self.options.observe_every
        if position < watch.first or skipped:
            return np.full((1, 1), np.inf, np.float32)
        asked = np.minimum(self._log2_weights - math.log2(seen), math.log2(self.options.most))
        return (asked - _SLACK).astype(np.float32)

    def observe(self, state: EvictState, layer: int, looks: Int32Array | Look) -> None:
        """Raise the layer's stamps [P, Hkv, S]."""
        pages = len(looks.hits if isinstance(looks, Look) else looks)
        self._cover(state, pages)
        own, spread = state.last_hit[layer, :pages], self.options.spread
        if isinstance(looks, Look):
            at, flat = tokens_of(bits_over(looks.hits, spread)), own.reshape(-1)
            flat[at] = np.maximum(flat[at], looks.position)
        else:
            np.maximum(own, spread_over(looks, spread), out=own)

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        """Return the masks after the row at `position`; what is dropped once stays so."""
        options, watch = self.options, state.watch
        observed = position + 1 - watch.first
        if not watch.decides(position) or observed < self._rows:
            return state.masks
        pages = position // PAGE_TOKENS + 1 - state.gap
        self._cover(state, pages)
        stamps = state.last_hit[:, :pages]
        at = positions(state, pages)
        recent = at > position - options.recent
        alive = unpack(state.masks, stamps.shape)
        live = alive & ((position - stamps < self._windows) | recent[:, None, :])
        if options.cap is not None:
            live = self._capped(live, alive, stamps, at.ravel() - position, options.cap)
        return pack(live)

    def _capped(
        self, live: Bools, alive: Bools, stamps: Int32Array, ahead: Int32Array, cap: int
    ) -> Bools:
        """Return live tokens [L, P, Hkv, S] between each head's floor and cap.

        What was looked at last stays first, of equals the later token. `ahead` [P * S]: by how much
        a token's position exceeds the row's.
        """
        kept, there, stamp = (_by_head(x) for x in (live, alive, stamps))
        index = np.arange(kept.shape[-1])
        unborn = ahead > 0
        order = stamp.astype(np.int64) * len(index) + index
        order[(ahead > -self.options.recent) | (stamp >= FOREVER)] += _FIRST
        order[~there | unborn] = -_FIRST
        place = np.argsort(np.argsort(-order, axis=-1), axis=-1)
        counts = (kept & ~unborn).sum(-1)
        floors = np.ceil(_FLOOR * counts.mean(-1, keepdims=True))
        chosen = there & (kept | (place < floors[..., None])) & (place < cap)
        chosen |= unborn | (there & (stamp >= FOREVER))
        return np.moveaxis(chosen.reshape(*chosen.shape[:2], -1, PAGE_TOKENS), 1, 2)

    def _cover(self, state: EvictState, pages: int) -> None:
        """Make room for stamps of so many pages; new tokens begin as the birth rule says."""
        layers, known, heads, rows = state.last_hit.shape
        if pages <= known:
            return
        total = max(pages, known + known // 2)
        fresh = np.full((total - known, rows), NEVER, np.int32)
        at = positions(state, total)[known:]
        if self.options.birth == "seen":
            fresh = np.where(at >= state.watch.first, at, fresh)
        for begin, end in state.protected:
            fresh[(at >= begin) & (at < end)] = FOREVER
        grown = np.empty((layers, total, heads, rows), np.int32)
        grown[:, :known] = state.last_hit
        grown[:, known:] = fresh[:, None, :]
        state.last_hit = grown


def spread_over(stamps: Int32Array, count: int) -> Int32Array:
    """Return [P, Hkv, S] the highest stamp of each token and so many before it."""
    if not count:
        return stamps
    pages, heads, rows = stamps.shape
    flat = stamps.transpose(1, 0, 2).reshape(heads, pages * rows)
    found = flat.copy()
    for ahead in range(1, min(count, flat.shape[1] - 1) + 1):
        np.maximum(found[:, ahead:], flat[:, :-ahead], out=found[:, ahead:])
    return np.ascontiguousarray(found.reshape(heads, pages, rows).transpose(1, 0, 2))


def bits_over(hits: UInt64Array, count: int) -> UInt64Array:
    """Return [P, Hkv] the bits of each token and so many before it, as `spread_over` of stamps."""
    found, done = hits, 0
    while done < count:
        ahead = min(done + 1, count - done)
        over = found >> np.uint64(PAGE_TOKENS - ahead)
        found = found | (found << np.uint64(ahead))
        found[1:] |= over[:-1]
        done += ahead
    return found


def tokens_of(hits: UInt64Array) -> NDArray[np.int64]:
    """Return where the bits of [P, Hkv] are set, counted over [P, Hkv, S]."""
    bits = np.unpackbits(hits.ravel().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits.view(np.bool_))


def unpack(masks: UInt64Array, shape: tuple[int, ...]) -> Bools:
    """Return masks [P', L, Hkv] as live tokens of `shape` [L, P, Hkv, S]; beyond P' all live."""
    layers, pages, heads, rows = shape
    full = np.full((pages, layers, heads), ~np.uint64(0))
    known = min(len(masks), pages)
    full[:known] = masks[:known]
    bits = np.unpackbits(
        full.view(np.uint8).reshape(pages, layers, heads, 8), -1, bitorder="little"
    )
    return np.moveaxis(bits.view(np.bool_), 0, 1).reshape(shape[0], pages, heads, rows)


def pack(live: Bools) -> UInt64Array:
    """Return live tokens [L, P, Hkv, S] as masks [P, L, Hkv]."""
    packed = np.packbits(live, -1, bitorder="little").view(np.uint64)[..., 0]
    return np.ascontiguousarray(np.moveaxis(packed, 0, 1))


def _by_head(tokens: NDArray[Any]) -> NDArray[Any]:
    """Return [L, P, Hkv, S] as [L, Hkv, P * S]."""
    layers, _, heads, _ = tokens.shape
    return np.moveaxis(tokens, 2, 1).reshape(layers, heads, -1)
