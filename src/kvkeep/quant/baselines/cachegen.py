"""cachegen: each group's first key, differences from it, and values in few levels, range-coded.

Groups are ten tokens of a page. A group's first key is rounded to 255 levels, the others'
differences from what it comes back as to 15 (7 in the last third of the layers), values to 5; in
the first layer differences have 255 levels and values 15. Levels are spread over plus and minus the
largest magnitude of a head's row, which is stored in 16 bits. Tables per layer, head and channel
are counted on a calibration sample and are not part of a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from kvkeep.quant.baselines import range_coder
from kvkeep.quant.baselines.base import KV, Baseline, Fields, joined
from kvkeep.quant.baselines.range_coder import Table
from kvkeep.quant.codec import KVShape, Place
from kvkeep.types import PAGE_TOKENS

_GROUP: Final = 10
_ANCHOR_LEVELS: Final = 255
_ANCHORS: Final = torch.arange(0, PAGE_TOKENS, _GROUP)
_ANCHOR_OF: Final = torch.arange(PAGE_TOKENS) // _GROUP
_IS_ANCHOR: Final = torch.arange(PAGE_TOKENS) % _GROUP == 0


class Levels(NamedTuple):
    """Levels of a layer's differences between keys, and of its values; odd."""

    delta: int
    value: int


class Coded(NamedTuple):
    """A layer of a page before range coding."""

    scales: torch.Tensor
    """[2, N, S, 1] float16 of keys (anchors' and differences') and of values."""
    codes: torch.Tensor
    """[2, N, S, D] int16, from 0."""


class Tables(NamedTuple):
    """One layer's tables, [N][D] of each."""

    anchor: list[list[Table]]
    delta: list[list[Table]]
    value: list[list[Table]]


def levels_of(layer: int, num_layers: int) -> Levels:
    """Return the levels of a layer."""
    if layer == 0:
        return Levels(255, 15)
    return Levels(7 if 3 * layer >= 2 * num_layers else 15, 5)


class CacheGen(Baseline):
    """Groups with anchors, and a range coder."""

    name = "cachegen"

    def __init__(self, sample: Sequence[Sequence[KV]]) -> None:
        """`sample`: per layer, pages k, v [N, S, D] to count symbols on."""
        self._num_layers = len(sample)
        self._tables = [self._counted(layer, pages) for layer, pages in enumerate(sample)]

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return the scales, then all codes token by token as one stream."""
        coded = self._code(k, v, place.layer)
        stream = range_coder.encode(
            coded.codes.permute(2, 0, 1, 3).flatten().tolist(), list(self._along(place.layer))
        )
        return joined([coded.scales]) + stream

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return what the codes stand for."""
        heads, dim = shape.num_kv_heads, shape.head_dim
        fields = Fields(blob)
        scales = fields.take(torch.float16, 2, heads, PAGE_TOKENS, 1)
        symbols = range_coder.decode(fields.rest(), list(self._along(place.layer)))
        codes = torch.tensor(symbols, dtype=torch.int16).view(PAGE_TOKENS, 2, heads, dim)
        return self._values(Coded(scales, codes.permute(1, 2, 0, 3)), place.layer)

    def rounded(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> KV:
        """Return what comes back: range coding loses nothing."""
        return self._values(self._code(k, v, place.layer), place.layer)

    def _code(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> Coded:
        levels, keys = levels_of(layer, self._num_layers), k.float()
        scale, codes = _symmetric(keys[:, _ANCHORS], _ANCHOR_LEVELS)
        anchors = _plain(scale, codes, _ANCHOR_LEVELS)
        delta_scale, delta = _symmetric(keys - anchors[:, _ANCHOR_OF], levels.delta)
        delta_scale[:, _IS_ANCHOR], delta[:, _IS_ANCHOR] = scale, codes
        value_scale, value = _symmetric(v.float(), levels.value)
        return Coded(torch.stack([delta_scale, value_scale]), torch.stack([delta, value]))

    def _values(self, coded: Coded, layer: int) -> KV:
        levels, (scale, value_scale) = levels_of(layer, self._num_layers), coded.scales
        codes, value = coded.codes
        anchors = _plain(scale[:, _ANCHORS], codes[:, _ANCHORS], _ANCHOR_LEVELS)
        keys = anchors[:, _ANCHOR_OF] + _plain(scale, codes, levels.delta)
        keys[:, _IS_ANCHOR] = anchors
        return keys, _plain(value_scale, value, levels.value)

    def _counted(self, layer: int, pages: Sequence[KV]) -> Tables:
        levels = levels_of(layer, self._num_layers)
        codes = torch.cat([self._code(k, v, layer).codes for k, v in pages], 2)
        anchors = _IS_ANCHOR.repeat(len(pages))
        return Tables(
            _tables(codes[0][:, anchors], _ANCHOR_LEVELS),
            _tables(codes[0][:, ~anchors], levels.delta),
            _tables(codes[1], levels.value),
        )

    def _along(self, layer: int) -> Iterator[Table]:
        """Yield the table of each symbol in the order of the stream."""
        tables = self._tables[layer]
        for anchor in _IS_ANCHOR.tolist():
            for one in (tables.anchor if anchor else tables.delta, tables.value):
                for head in one:
                    yield from head


def _symmetric(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float16 scales [..., 1] and codes from 0 of x float32, over its last axis."""
    half = levels // 2
    scale = (x.abs().amax(-1, keepdim=True) / half).half()
    safe = torch.where(scale == 0, 1.0, scale.float())
    codes = (x / safe).round().clamp(-half, half) + half
    return scale, codes.to(torch.int16)


def _plain(scale: torch.Tensor, codes: torch.Tensor, levels: int) -> torch.Tensor:
    return scale.float() * (codes - levels // 2)


def _tables(codes: torch.Tensor, levels: int) -> list[list[Table]]:
    """Return the tables [N][D] of codes [N, tokens, D]."""
    counts = torch.nn.functional.one_hot(codes.long(), levels).sum(1).double().numpy()
    return [[range_coder.table_of(np.asarray(one)) for one in head] for head in counts]
