"""kvquant: two-bit codes of levels found by k-means, the worst hundredth of values beside them.

Keys have four levels per layer, head and channel. A value is scaled by its token's least and
largest and has four levels per layer and head. Both kinds of levels come from a calibration sample
and are not part of a page. Of each tile's keys, and of its values, the hundredth that is farthest
from its channel's (token's) middle is stored as (place, 16-bit float); so is the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from kvkeep.quant.baselines.base import (
    KV,
    Baseline,
    Fields,
    joined,
    pack_bits,
    unpack_bits,
)
from kvkeep.quant.codec import KVShape, Place
from kvkeep.types import PAGE_TOKENS

_BITS: Final = 2
_OUTLIERS: Final = 0.01
_ROUNDS: Final = 20
_SAMPLE: Final = 4096


class Learnt(NamedTuple):
    """One layer's levels, in rising order, and the middle and spread of its channels."""

    key_levels: torch.Tensor
    """[N, 1, D, 4]."""
    key_middle: torch.Tensor
    """[N, 1, D], as is `key_spread`."""
    key_spread: torch.Tensor
    value_levels: torch.Tensor
    """[N, 1, 1, 4] between 0 and 1."""


class KvQuant(Baseline):
    """Learnt levels and stored outliers."""

    name = "kvquant"

    def __init__(self, sample: Sequence[Sequence[KV]]) -> None:
        """`sample`: per layer, pages k, v [N, S, D] to learn levels on."""
        self._learnt = [_learn(pages) for pages in sample]

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return codes, tokens' ranges, outliers and the first token if it is a sequence's."""
        learnt, keys, values = self._learnt[place.layer], k.float(), v.float()
        key_places = _farthest((keys - learnt.key_middle).abs() / learnt.key_spread)
        value_places, least, span = _ranges(values)
        codes = torch.stack(
            [
                _nearest(keys, learnt.key_levels),
                _nearest((values - least) / span, learnt.value_levels),
            ]
        )
        places = torch.stack([key_places, value_places])
        picked = torch.stack([keys, values]).flatten(2).gather(2, places)
        parts = [pack_bits(codes, _BITS), least.half(), span.half()]
        parts += [places.to(torch.uint16), picked.half()]
        if place.first:
            parts.append(torch.stack([keys[:, 0], values[:, 0]]).half())
        return joined(parts)

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return levels with outliers and the first token put back."""
        learnt, heads, dim = self._learnt[place.layer], shape.num_kv_heads, shape.head_dim
        fields, size = Fields(blob), PAGE_TOKENS * dim
        codes = unpack_bits(fields.take(torch.uint8, 2 * heads * size * _BITS // 8), _BITS)
        key_codes, value_codes = codes.view(2, heads, PAGE_TOKENS, dim).long()
        least, span = (fields.take(torch.float16, heads, PAGE_TOKENS, 1).float() for _ in range(2))
        keys = _level(key_codes, learnt.key_levels)
        x = torch.stack([keys, _level(value_codes, learnt.value_levels) * span + least])
        outliers = (2, heads, _outliers(dim))
        places = fields.take(torch.uint16, *outliers).long()
        x.view(2, heads, size).scatter_(2, places, fields.take(torch.float16, *outliers).float())
        if place.first:
            x[:, :, 0] = fields.take(torch.float16, 2, heads, dim).float()
        return x[0], x[1]


def _outliers(dim: int) -> int:
    return max(1, round(_OUTLIERS * PAGE_TOKENS * dim))


def _farthest(distance: torch.Tensor) -> torch.Tensor:
    """Return the places [N, n] of a tile's outliers by their distance [N, S, D]."""
    return distance.flatten(1).topk(_outliers(distance.shape[2])).indices


def _ranges(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return outliers' places, and each token's least value and span [N, S, 1] without them."""
    places = _farthest((values - values.mean(2, keepdim=True)).abs())
    out = torch.zeros_like(values).flatten(1).scatter_(1, places, 1.0).view(values.shape).bool()
    least = values.masked_fill(out, torch.inf).amin(2, keepdim=True)
    high = values.masked_fill(out, -torch.inf).amax(2, keepdim=True)
    least, high = (torch.where(torch.isfinite(x), x, 0.0) for x in (least, high))
    least = least.half().float()
    span = (high - least).half().float()
    return places, least, torch.where(span <= 0, 1.0, span)


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the codes, uint8, of the nearest of levels [..., 4] in rising order."""
    between = (levels[..., 1:] + levels[..., :-1]) / 2
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    for bound in between.unbind(-1):
        codes += x > bound
    return codes


def _level(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels.expand(*codes.shape, 4).gather(3, codes[..., None])[..., 0]


def _learn(pages: Sequence[KV]) -> Learnt:
    """Return a layer's levels from pages of it."""
    keys = torch.cat([k.float() for k, _ in pages], 1).transpose(1, 2)  # [N, D, tokens]
    ends = torch.quantile(keys, torch.tensor([_OUTLIERS / 2, 0.5, 1 - _OUTLIERS / 2]), dim=2)
    low, middle, high = ends
    inside = torch.maximum(torch.minimum(keys, high[..., None]), low[..., None])
    values = torch.cat([v.float() for _, v in pages], 1)
    least, high_v = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    parts = ((values - least) / (high_v - least).clamp_min(1e-9)).flatten(1)
    picked = parts[:, :: max(1, parts.shape[1] // _SAMPLE)]
    spread = (high - low).clamp_min(1e-6)[:, None]
    return Learnt(
        _k_means(inside)[:, None], middle[:, None], spread, _k_means(picked)[:, None, None]
    )


def _k_means(x: torch.Tensor) -> torch.Tensor:
    """Return four levels in rising order, [..., 4], of samples [..., n]."""
    start = torch.quantile(x, torch.tensor([0.125, 0.375, 0.625, 0.875]), dim=-1)
    levels = start.movedim(0, -1).contiguous()
    for _ in range(_ROUNDS):
        codes = _nearest(x, levels[..., None, :]).long()
        sums = torch.zeros_like(levels).scatter_add_(-1, codes, x)
        counts = torch.zeros_like(levels).scatter_add_(-1, codes, torch.ones_like(x))
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels).sort(-1).values
    return levels
