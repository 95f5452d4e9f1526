"""Homomorphic codes: small integers that attention multiplies as they are.

Keys share a scale and a least value per channel over a page, values per token over a partition of
channels: neither lies along the sum of its product, so both are folded into the query and the
weights, and what attention sums are products of integers. Scales and least values are rounded to
bfloat16 before codes are taken, so a code is the nearest one to what is stored. The first
`SINK_TOKENS` tokens of a sequence stay in 16 bits.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch

from kvkeep.errors import NonFiniteKV
from kvkeep.ops.codes import (
    CODE_BITS,
    SINK_TOKENS,
    Codes,
    coded_tile_bytes,
    pack_codes,
    pack_sinks,
    partition_channels,
    sink_bytes,
    unpack_codes,
    unpack_sinks,
)
from kvkeep.ops.cpu import cpu_encoder
from kvkeep.ops.layout import HOST, WeightFold
from kvkeep.quant.codec import KVShape, Place, Rotation, Tiles
from kvkeep.types import PAGE_TOKENS, WINDOW_STEP, Layout, PageSpec

_LEAST_SCALE: Final = torch.finfo(torch.float32).tiny
"""Smaller scales are not told apart from 0 by processors that flush denormals."""
_FITTED_BITS: Final = 2
"""Bits of keys whose scale is fitted; with more, the ends of the range do as well."""
_NARROWED: Final = 0.85


class Affine(NamedTuple):
    """x = scale * code + least."""

    scale: torch.Tensor
    """bfloat16, as is `least`."""
    least: torch.Tensor


class Hack:
    """Pages as codes of 2, 4 or 8 bits, named after their layout and what bits follow from."""

    def __init__(
        self, layout: Layout, window_tokens: int = WINDOW_STEP, *, rotate: bool = True
    ) -> None:
        """`rotate`: keys are coded after a Hadamard rotation, which spreads what they differ in."""
        window = "" if window_tokens == WINDOW_STEP else f"-w{window_tokens}"
        self.name = layout.name.lower() + window + ("" if rotate else "-plain")
        self.layout = layout
        self.window_tokens = window_tokens
        self.bits = CODE_BITS[layout]
        self._rotate = rotate
        self._encoder = cpu_encoder()

    def page_spec(self, shape: KVShape) -> PageSpec:
        """Return the coded layout's spec."""
        return PageSpec(
            layout=self.layout,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            tile_bytes=coded_tile_bytes(self.layout, shape.head_dim),
            window_tokens=self.window_tokens,
            first_extra_bytes=sink_bytes(shape.head_dim),
        )

    def folds(self, shape: KVShape) -> tuple[WeightFold, ...]:
        """No weight changes."""
        return ()

    def rotation(self, shape: KVShape) -> Rotation | None:
        """Return a Hadamard matrix, in powers of two on both sides."""
        return hadamard(shape.head_dim) if self._rotate else None

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Return coded tiles [N, tile bytes] of k, v [N, S, D]; a CPU's kernel makes a CPU's."""
        if k.device != HOST:
            return self.encode_plainly(k, v, place)
        narrowed = _NARROWED if self.bits.k == _FITTED_BITS else 0.0
        return self._encoder.encode(k, v, self.layout, first=place.first, narrowed=narrowed)

    def encode_plainly(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Return what `encode` does, by torch where k and v are: the kernel's oracle."""
        tiles = pack_codes(self.codes(k, v, first=place.first), self.layout)
        if place.first:
            sinks = [x[:, :SINK_TOKENS].to(torch.bfloat16) for x in (k, v)]
            _require_finite(*sinks)
            tiles = torch.cat([tiles, pack_sinks(*sinks)], 1)
        return np.asarray(tiles.cpu().numpy())

    def decode(
        self, tiles: Tiles, shape: KVShape, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 k, v [N, S, D]."""
        raw, dim = torch.from_numpy(np.ascontiguousarray(tiles)), shape.head_dim
        k, v = dequantise(unpack_codes(raw, self.layout, dim))
        if place.first:
            area = raw[:, coded_tile_bytes(self.layout, dim) :]
            k[:, :SINK_TOKENS], v[:, :SINK_TOKENS] = unpack_sinks(area, dim)
        return k, v

    def codes(self, k: torch.Tensor, v: torch.Tensor, *, first: bool) -> Codes:
        """Return the codes of k, v [N, S, D]; sinks have codes, scales and least values of 0."""
        n, _, dim = v.shape
        keys = k.float()
        values = v.float().view(n, PAGE_TOKENS, -1, partition_channels(dim))
        begin = SINK_TOKENS if first else 0
        k_affine = (fitted if self.bits.k == _FITTED_BITS else affine)(
            keys[:, begin:], self.bits.k, axis=1
        )
        v_affine = affine(values, self.bits.v, axis=3)
        if first:
            for part in v_affine:
                part[:, :begin] = 0
        _require_finite(k_affine.scale + k_affine.least, v_affine.scale + v_affine.least)
        k_codes = quantise(keys, k_affine, self.bits.k)
        v_codes = quantise(values, v_affine, self.bits.v).view(n, PAGE_TOKENS, dim)
        if first:
            k_codes[:, :begin] = 0
            v_codes[:, :begin] = 0
        k_scale, k_least = (part.view(n, dim) for part in k_affine)
        v_scale, v_least = (part.view(n, PAGE_TOKENS, -1).transpose(1, 2) for part in v_affine)
        return Codes(k_codes, k_scale, k_least, v_codes, v_scale, v_least)


def hadamard(dim: int) -> Rotation:
    """Return a rotation by Hadamard matrices of the largest power of two that divides `dim`.

    All entries are powers of two, so that 16-bit weights hold them exactly.
    """
    size = dim & -dim
    block = torch.ones((1, 1))
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    matrix = torch.kron(torch.eye(dim // size), block)
    halvings = size.bit_length() - 1
    return Rotation(matrix / 2 ** (halvings - halvings // 2), matrix / 2 ** (halvings // 2))


def affine(x: torch.Tensor, bits: int, axis: int) -> Affine:
    """Return what x float32 is coded with along `axis`, which is kept with length 1."""
    low, high = (end(x, dim=axis, keepdim=True) for end in (torch.amin, torch.amax))
    least = (low + 0.0).to(torch.bfloat16)  # 0 has one sign
    scale = ((high - least.float()) / ((1 << bits) - 1)).to(torch.bfloat16)
    return Affine(_usable(scale), least)


def fitted(x: torch.Tensor, bits: int, axis: int) -> Affine:
    """Return what x is coded with after one step of least squares from a narrower range.

    The ends of the range come closer to the middle by `_NARROWED`: with few levels the steps
    between them count for more than the rare values beyond.
    """
    low, high = (end(x, dim=axis, keepdim=True) for end in (torch.amin, torch.amax))
    span = (high - low) * _NARROWED
    begin = low + (high - low) * ((1 - _NARROWED) / 2)
    step = torch.where(span > 0, span / ((1 << bits) - 1), 1.0)
    codes = ((x - begin) / step).round_().clamp_(0, (1 << bits) - 1)
    above = x - low
    mean_code = codes.sum(axis, keepdim=True) / x.shape[axis]  # integers: exact in any order
    codes -= mean_code
    mean, along, spread = _means(torch.stack([above, codes * above, codes.square()]), axis + 1)
    scale = torch.where(spread > 0, along / spread, span).to(torch.bfloat16)
    least = low + mean - torch.where(scale < _LEAST_SCALE, 0.0, scale.float() * mean_code)
    return Affine(_usable(scale), least.to(torch.bfloat16))


def quantise(x: torch.Tensor, stored: Affine, bits: int) -> torch.Tensor:
    """Return the nearest codes, uint8, of x float32."""
    codes = (x - stored.least).div_(stored.scale).round_()
    return codes.clamp_(0, (1 << bits) - 1).to(torch.int16).to(torch.uint8)


def dequantise(codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 k, v [N, S, D] of what codes stand for."""
    n, _, dim = codes.v.shape
    k = codes.k_scale.float()[:, None] * codes.k + codes.k_min.float()[:, None]
    parts = codes.v.view(n, PAGE_TOKENS, -1, partition_channels(dim))
    scale, least = (x.float().transpose(1, 2)[..., None] for x in (codes.v_scale, codes.v_min))
    return k, (scale * parts + least).view(n, PAGE_TOKENS, dim)


def together(codes: Codes, tile: torch.Tensor, token: torch.Tensor, k_bits: int) -> Codes:
    """Return the codes of tokens [n, S] of several tiles.

    Those of values are the same; those of keys are the nearest to what the keys were coded as.
    """
    k = codes.k_scale.float()[tile] * codes.k[tile, token] + codes.k_min.float()[tile]
    stored = (fitted if k_bits == _FITTED_BITS else affine)(k, k_bits, axis=1)
    v_scale, v_min = (
        part.transpose(1, 2)[tile, token].transpose(1, 2) for part in (codes.v_scale, codes.v_min)
    )
    k_scale, k_min = (part.squeeze(1) for part in stored)
    k_codes = quantise(k, stored, k_bits)
    return Codes(k_codes, k_scale, k_min, codes.v[tile, token], v_scale, v_min)


def _means(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Return means along `axis`, which is kept with length 1.

    Zeros are appended up to a power of two and halves added until one is left, so that a sum has
    one possible result.
    """
    count = x.shape[axis]
    half = 1 << (count - 1).bit_length() >> 1
    total = torch.cat([x, torch.zeros_like(x.narrow(axis, 0, 2 * half - count))], axis)
    while half:
        total = total.narrow(axis, 0, half) + total.narrow(axis, half, half)
        half //= 2
    return total / count


def _usable(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale < _LEAST_SCALE, 1.0, scale).to(torch.bfloat16)


def _require_finite(k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise `NonFiniteKV` for the first head [N, ...] with a value that isn't finite."""
    for what, x in (("K", k), ("V", v)):
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            raise NonFiniteKV(what, int(finite.int().argmin()))
