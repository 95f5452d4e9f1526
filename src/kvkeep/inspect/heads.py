"""Which window and weight each KV head needs: measured on text, written beside the checkpoint.

A text is read whole. Of the first three quarters each head drops what the rule with (w, c) drops at
their end; what the rows of the last quarter gave to those tokens is lost. A head gets the rule that
keeps least among those that lose at most a given part of its weight. Where none does, the mildest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from kvkeep.engine.backend import choose
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import unwrap_of
from kvkeep.errors import ConfigError
from kvkeep.eviction.calibration import HeadRule
from kvkeep.eviction.corm import CormOptions
from kvkeep.inspect.calibrate import MOST_TOKENS, Trial, cut
from kvkeep.models import hub, loader
from kvkeep.models.host import HostedModel

WINDOWS: Final = (32, 64, 128, 256)
WEIGHTS: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0)
RULES: Final = tuple(HeadRule(window=w, weight=c) for w in WINDOWS for c in WEIGHTS)
PART: Final = 0.75
"""Of a text, what stands before the decision."""
CHUNK: Final = 256
MOST_LOST: Final = 0.02
"""Of a head's weight, where nothing else is asked for."""

Grid = NDArray[np.float64]


class Found(NamedTuple):
    """A choice and what it was made from."""

    layers: tuple[tuple[HeadRule, ...], ...]
    """[L][Hkv]"""
    kept: Grid
    """[L, Hkv] share of tokens that the choice keeps."""
    lost: Grid
    """[L, Hkv] share of the later rows' weight that was on what it drops."""
    preset_kept: float
    """Share of tokens that the preset keeps of the same texts, all heads alike."""
    preset_lost: float
    digest: str
    """Of the model, in hexadecimal."""


class Whole:
    """K and V of one text, attended to in plain torch; keeps a step's weights per layer."""

    def __init__(self) -> None:
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.weights: dict[int, Tensor] = {}
        """[rows, Hkv, T] the largest in each head's group."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [rows, Hkv, D]."""
        fresh = (k.float(), v.float())
        known = self._kv.get(layer)
        joined = fresh if known is None else tuple(map(torch.cat, zip(known, fresh, strict=True)))
        self._kv[layer] = (joined[0], joined[1])

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Return [rows, Hq, D]."""
        k, v = self._kv[layer]
        (rows, _, dim), tokens = q.shape, len(k)
        grouped = q.float().view(rows, k.shape[1], -1, dim)
        scores = torch.einsum("rhgd,thd->rhgt", grouped, k) / math.sqrt(dim)
        ahead = torch.arange(tokens) > torch.arange(tokens - rows, tokens)[:, None]
        weights = scores.masked_fill_(ahead[:, None, None], -math.inf).softmax(-1)
        self.weights[layer] = weights.amax(2)
        return torch.einsum("rhgt,thd->rhgd", weights, v).reshape(q.shape).to(q.dtype)


def calibrate(
    options: EngineOptions,
    texts: Sequence[Sequence[int]],
    most_lost: float,
    preset: CormOptions,
    progress: Callable[[int, int], None],
) -> Found:
    """Measure every rule on every head and choose; without texts the model writes its own.

    `preset`: how many of the latest tokens stay anyhow, and of those after a hit. Raises
    `ConfigError` where a text is too short.
    """
    if not 0 < most_lost < 1:
        raise ConfigError(f"most_lost: {most_lost:g} must lie between 0 and 1")
    pieces = cut(texts, MOST_TOKENS)
    if not pieces:
        trial = Trial(options)
        pieces = trial.own_texts()
        trial.close()
    threads = options.threads or len(os.sched_getaffinity(0))
    backend = choose(options, threads)
    path = hub.resolve(options.model, allow_download=options.allow_download)
    model = loader.load(
        path,
        dtype=options.dtype,
        ops=backend.ops,
        weights=options.weights,
        unwrap=unwrap_of(options.keys),
    )
    return measure(model, pieces, most_lost, preset, progress)


def measure(
    model: HostedModel,
    texts: Sequence[Sequence[int]],
    most_lost: float,
    preset: CormOptions,
    progress: Callable[[int, int], None],
) -> Found:
    """Measure every rule on every head of a model and choose."""
    kept = torch.zeros(len(RULES) + 1, model.spec.num_layers, model.spec.num_kv_heads)
    lost = torch.zeros_like(kept)
    for number, text in enumerate(texts):
        one_kept, one_lost = _read(model, text, preset)
        kept += one_kept / len(texts)
        lost += one_lost / len(texts)
        progress(number + 1, len(texts))
    (kept, preset_kept), (lost, preset_lost) = ((x[:-1], float(x[-1].mean())) for x in (kept, lost))
    fits = lost <= most_lost
    order = torch.where(fits.any(0), kept.masked_fill(~fits, math.inf), lost)
    best = order.argmin(0)
    layers = tuple(tuple(RULES[i] for i in layer) for layer in best.tolist())
    own_kept, own_lost = (x.gather(0, best[None])[0].double().numpy() for x in (kept, lost))
    digest = model.spec.digest.hex()
    return Found(layers, own_kept, own_lost, preset_kept, preset_lost, digest)


def _read(model: HostedModel, text: Sequence[int], preset: CormOptions) -> tuple[Tensor, Tensor]:
    """Return kept and lost shares [rules, L, Hkv] of one text, the preset's own rule last."""
    own = HeadRule(window=preset.prompt_rows or preset.window, weight=preset.weight)
    split = int(PART * len(text))
    kv = Whole()
    shape = (model.spec.num_layers, model.spec.num_kv_heads, split)
    shares = {w: torch.zeros(shape) for w in (*WINDOWS, own.window)}
    later, rows = torch.zeros(shape), 0
    for begin, end in row_steps(split, len(text)):
        ids, positions = torch.tensor(text[begin:end]), torch.arange(begin, end)
        model.forward(ids, positions, kv, torch.tensor([end - begin - 1]))
        weights = torch.stack([kv.weights[layer] for layer in range(shape[0])])
        if begin >= split:
            later += weights[..., :split].sum(1)
            rows += end - begin
            continue
        scaled = weights * (positions + 1)[:, None, None]
        scaled.masked_fill_(weights >= preset.most, math.inf)
        for w, known in shares.items():
            inside = positions >= split - w
            if inside.any():
                best = scaled[:, inside].amax(1)
                known[..., :end] = known[..., :end].maximum(best)
    stays = torch.arange(split) >= split - preset.recent
    shares = {w: _spread(known, preset.spread) for w, known in shares.items()}
    kept, lost = [], []
    for rule in (*RULES, own):
        live = (shares[rule.window] >= rule.weight) | stays
        kept.append(live.float().mean(-1))
        lost.append((later * ~live).sum(-1) / rows)
    return torch.stack(kept), torch.stack(lost)


def _spread(shares: Tensor, count: int) -> Tensor:
    """Return the largest of each token's and so many before it, of [L, Hkv, T]."""
    return max_pool1d(pad(shares, (count, 0)), count + 1, 1) if count else shares


def row_steps(split: int, end: int) -> list[tuple[int, int]]:
    """Return ranges of rows, none across the split."""
    return [
        (at, min(at + CHUNK, last))
        for first, last in ((0, split), (split, end))
        for at in range(first, last, CHUNK)
    ]
