"""Reference attention on coded tiles: integers where the kernels use integers, and nothing hidden.

What a kernel must compute to the bit is here too: the query row as signed bytes, the weights of a
page as unsigned bytes, and both in float32.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from kvkeep.ops.codes import (
    SINK_TOKENS,
    coded_tile_bytes,
    partition_channels,
    tile_bytes,
    unpack_codes,
    unpack_sinks,
)
from kvkeep.types import Layout

QUERY_TOP: Final = 127
WEIGHT_TOP: Final = 255

LEAST: Final = 2.0**-100
"""A partition whose largest value is below this counts as zeros: its reciprocal might not exist."""


class Quantised(NamedTuple):
    """Integers [..., n] and their scale [...]: value = scale * integer."""

    integers: torch.Tensor
    """float32, each exactly an integer."""
    scale: torch.Tensor


def quantise_query(folded: torch.Tensor) -> Quantised:
    """Return q_d * k_scale_d [..., NP, KP] float32 in -127..127, a scale per partition."""
    return _quantise(folded, QUERY_TOP)


def quantise_weights(folded: torch.Tensor) -> Quantised:
    """Return p_t * v_scale_t [..., NP, S] float32 in 0..255, a scale per partition."""
    return _quantise(folded, WEIGHT_TOP)


def _quantise(values: torch.Tensor, top: int) -> Quantised:
    largest = values.abs().amax(dim=-1)
    usable = largest >= LEAST
    factor = torch.where(
        usable, torch.full_like(largest, top) / largest, 0.0
    )  # one rounding, not two
    integers = torch.where(usable[..., None], (values * factor[..., None]).round(), 0.0)
    return Quantised(integers, torch.where(usable, largest / top, torch.ones_like(largest)))


class CodedTile:
    """One KV head's coded tile: scores and weighted sums in `compute` precision around integers."""

    def __init__(
        self,
        raw: torch.Tensor,
        layout: Layout,
        head_dim: int,
        compute: torch.dtype,
        *,
        first: bool,
    ) -> None:
        self._compute = compute
        self._parts = (head_dim // partition_channels(head_dim), partition_channels(head_dim))
        codes = unpack_codes(raw[None], layout, head_dim)
        self._k, self._v = codes.k[0].to(compute), codes.v[0].to(compute)
        self._k_scale, self._k_min = codes.k_scale[0].float(), codes.k_min[0].to(compute)
        self._v_scale, self._v_min = codes.v_scale[0].float(), codes.v_min[0].to(compute)
        self._sinks = 0
        if first:
            self._sinks = SINK_TOKENS
            area = raw[
                None, coded_tile_bytes(layout, head_dim) : tile_bytes(layout, head_dim, first=True)
            ]
            k, v = unpack_sinks(area, head_dim)
            self._sink_k, self._sink_v = k[0].to(compute), v[0].to(compute)

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """Return q [G, D] times the keys [G, S], before any scale."""
        query = quantise_query((q.float() * self._k_scale).view(len(q), *self._parts))
        integers = query.integers.to(self._compute)
        keys = self._k.reshape(-1, *self._parts)
        scores = torch.einsum("ghd,thd,gh->gt", integers, keys, query.scale.to(self._compute))
        scores = scores + (q.to(self._compute) @ self._k_min)[:, None]
        if self._sinks:
            scores[:, : self._sinks] = q.to(self._compute) @ self._sink_k.T
        return scores

    def weigh(self, p: torch.Tensor) -> torch.Tensor:
        """Return p [G, S] times the values [G, D]."""
        coded = p.clone()
        coded[:, : self._sinks] = 0
        weights = quantise_weights(coded.float()[:, None] * self._v_scale)  # [G, NP, S]
        values = self._v.reshape(-1, *self._parts)
        summed = torch.einsum(
            "ght,thd,gh->ghd",
            weights.integers.to(self._compute),
            values,
            weights.scale.to(self._compute),
        )
        summed = summed + torch.einsum("gt,ht->gh", coded, self._v_min)[..., None]
        out = summed.flatten(1)
        return out + p[:, : self._sinks] @ self._sink_v if self._sinks else out
