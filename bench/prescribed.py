"""What a prompt keeps, prescribed: random weights look at everything alike, so they say nothing.

Shares per layer and KV head are those of CORM on the demo model, scaled to a mean, over and over
for models with more of them. Observing costs what it costs: rows are observed as ever.
"""

from __future__ import annotations

import json
from typing import Final

import numpy as np

from bench.harness import Options
from bench.ours import Ours, greedy
from kvkeep.config import DEMO_MODEL
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.corm import PRESETS, Corm, CormOptions, pack, unpack
from kvkeep.eviction.policy import positions
from kvkeep.models.text import TextModel
from kvkeep.quant.codec import Float
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, FloatArray, UInt64Array
from kvkeep.watch import EvictState

KEPT: Final = 0.25
OWN: Final = 32
"""Tokens of each prompt that are computed, and observed."""
RECENT: Final = 256
SEEN: Final = 2_048
"""Tokens of the text that the demo model reads."""
SINKS: Final = 4


class _Watched(Corm):
    """CORM as ever that remembers what it kept of each head at a prompt's end."""

    def __init__(self, options: CormOptions) -> None:
        super().__init__(options)
        self.kept = np.ones(0, np.float32)

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        """Decide as ever."""
        masks = super().keep(state, position)
        if position + 1 == state.watch.prompt_tokens and masks.size:
            pages, layers, heads = masks.shape
            live = unpack(masks, (layers, pages, heads, PAGE_TOKENS))
            whole = live[:, 1 : (position - self.options.window) // PAGE_TOKENS]
            self.kept = whole.mean((1, 3)).ravel().astype(np.float32)
        return masks


def demo_shares(options: Options) -> FloatArray:
    """Return [L * Hkv] what CORM keeps of a text in each head of the demo model, window aside."""
    text = TextModel.load(DEMO_MODEL)
    lines = (DEMO_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    words = "\n".join(" ".join(map(str, json.loads(line).values())) for line in lines)
    evictor = _Watched(PRESETS["corm"])
    parts = Parts(techniques=Techniques(Float(), NoShield(), evictor))
    ours = Ours(DEMO_MODEL, threads=options.threads, kv_cache_bytes=64 << 20, parts=parts)
    ours.submit(text.encode(words)[:SEEN], greedy(1))
    ours.step_seconds()
    return evictor.kept


def scaled(shares: FloatArray, mean: float) -> FloatArray:
    """Return shares times a factor, each 1 at most, so that they have a mean."""
    low, high = 0.0, 1.0 / max(float(shares.min()), 1e-6)
    for _ in range(60):
        middle = (low + high) / 2
        above = float(np.minimum(shares * middle, 1.0).mean()) > mean
        low, high = (low, middle) if above else (middle, high)
    found: FloatArray = np.minimum(shares * low, 1.0).astype(np.float32)
    return found


class Prescribed(Corm):
    """Observes as ever; at a prompt's end keeps so much of each head, and all that comes later."""

    def __init__(self, shares: FloatArray, kept: float = KEPT) -> None:
        """`shares` [N] of heads, over and over; `kept` of a prompt's tokens, the latest too."""
        super().__init__(CormOptions(window=OWN, recent=RECENT, weight=4.0, sinks=SINKS))
        self._shares = shares
        self._kept = kept

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        """Return masks that follow from the position alone."""
        seen = position + 1
        if seen != state.watch.prompt_tokens:
            return state.masks
        self._cover(state, position // PAGE_TOKENS + 1)
        layers, pages, heads, _ = state.last_hit.shape
        at = positions(state, pages)
        always = (at < SINKS) | (at > position - RECENT)
        fixed = SINKS + RECENT
        mean = max(0.01, (self._kept * seen - fixed) / (seen - fixed))
        shares = scaled(np.resize(self._shares, (layers, heads)), mean)
        drawn = np.random.default_rng(seen).random((layers, pages, heads, PAGE_TOKENS), np.float32)
        return pack((drawn < shares[:, None, :, None]) | always[:, None, :])
