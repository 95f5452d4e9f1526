"""Every baseline: what is coded comes back, in a buffer of the length its format gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from kvkeep.quant.baselines.base import (
    Baseline,
    Dequantised,
    Stored,
    pack_bits,
    shape_of,
    unpack_bits,
)
from kvkeep.quant.baselines.blocks import Q4, Q8
from kvkeep.quant.baselines.cachegen import CacheGen
from kvkeep.quant.baselines.fp8 import Fp8
from kvkeep.quant.baselines.kivi import Kivi
from kvkeep.quant.baselines.kvquant import KvQuant
from kvkeep.quant.baselines.paper import HackPaper
from kvkeep.quant.codec import Place, unpack_float_tiles
from kvkeep.quant.hack import Hack
from kvkeep.types import Layout
from tests.quant.baselines.pages import DIM, HEADS, page, plain, sample


@cache
def cachegen() -> CacheGen:
    return CacheGen(sample())


@cache
def kvquant() -> KvQuant:
    return KvQuant(sample())


MADE: dict[str, Callable[[], Baseline]] = {
    "fp8": Fp8,
    "q8_0": Q8,
    "q4_0": Q4,
    "kivi2": Kivi,
    "cachegen": cachegen,
    "kvquant": kvquant,
    "hack-paper": HackPaper,
    "k2v2": lambda: Stored(Hack(Layout.K2V2)),
}
ERROR = {
    "fp8": (0.03, 0.03),
    "q8_0": (0.006, 0.006),
    "q4_0": (0.1, 0.1),
    "kivi2": (0.06, 0.45),
    "cachegen": (0.04, 0.45),
    "kvquant": (0.15, 0.35),
    "hack-paper": (0.7, 0.7),
    "k2v2": (0.08, 0.5),
}
"""Largest relative errors of keys and values."""
BITS = {
    "fp8": 8 + 32 / (64 * DIM),
    "q8_0": 8.5,
    "q4_0": 4.5,
    "kivi2": 3.0,
    "hack-paper": 2 + 40 / 64,
    "k2v2": 2.5,
}
"""Bits per number, where they don't depend on the numbers."""
ANY = pytest.mark.parametrize("name", list(MADE))


@ANY
@pytest.mark.parametrize("place", [Place(0, True), Place(1, False), Place(2, False)])
def test_what_is_coded_comes_back(name: str, place: Place) -> None:
    baseline, (k, v) = MADE[name](), page(7)
    assert baseline.name == name
    blob = baseline.encode(k, v, place)
    assert isinstance(blob, bytes)
    back = baseline.decode(blob, shape_of(k), place)
    for found, expected, limit in zip(back, (k, v), ERROR[name], strict=True):
        error = float((found - expected).norm() / expected.float().norm())
        assert 0.001 < error < limit
    again = baseline.rounded(k, v, place)
    assert all(torch.equal(a, b) for a, b in zip(again, back, strict=True))


@pytest.mark.parametrize("name", list(BITS))
def test_the_buffer_has_the_length_of_its_format(name: str) -> None:
    k, v = page()
    length = len(MADE[name]().encode(k, v, Place(1, False)))
    assert length == BITS[name] * (k.numel() + v.numel()) / 8


@pytest.mark.parametrize(("name", "most"), [("cachegen", 3.5), ("kvquant", 3.0)])
def test_what_depends_on_the_numbers_is_small(name: str, most: float) -> None:
    k, v = page()
    assert len(MADE[name]().encode(k, v, Place(1, False))) < most * (k.numel() + v.numel()) / 8


@ANY
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_page_comes_back_almost_as_it_was(name: str, value: float) -> None:
    baseline, (k, v) = MADE[name](), plain(value)
    if name == "kvquant":
        baseline = KvQuant([[(k, v)]] * 3)
    for x in baseline.rounded(k, v, Place(2, False)):
        assert x.sub(value).abs().max() <= 0.01 * value


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bits_come_back(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (96,), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert len(packed) == 96 * bits // 8
    assert torch.equal(unpack_bits(packed, bits), codes)


def test_dequantised_pages_are_float_pages_of_what_comes_back() -> None:
    codec, (k, v) = Dequantised(Kivi()), page()
    shape = shape_of(k)
    tiles = codec.encode(k, v, Place(0, False))
    spec = codec.page_spec(shape)
    assert tiles.shape == (HEADS, spec.tile_bytes)
    assert spec.first_tile_bytes == spec.tile_bytes
    assert (spec.layout, codec.name) == (Layout.BF16, "kivi2-dequantised")
    expected = Kivi().rounded(k, v, Place(0, False))
    for found in (unpack_float_tiles(tiles, shape), codec.decode(tiles, shape, Place(0, False))):
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found, expected, strict=True))
    assert codec.stored_bytes == len(Kivi().encode(k, v, Place(0, False)))
    assert codec.float_bytes == np.prod(tiles.shape)


def test_dequantised_codes_every_nth_page_for_its_bytes_and_rounds_all() -> None:
    codec, (k, v) = Dequantised(cachegen(), every=3), page()
    tiles = [codec.encode(k, v, Place(2, False)) for _ in range(4)]
    expected = cachegen().encode(k, v, Place(2, False))
    assert codec.stored_bytes == 2 * len(expected)
    assert codec.float_bytes == 2 * tiles[0].nbytes
    assert all(np.array_equal(tiles[0], one) for one in tiles)
