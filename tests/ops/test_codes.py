from __future__ import annotations

import pytest
import torch

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
from kvkeep.types import PAGE_TOKENS, Layout

CODED = list(CODE_BITS)


def random_codes(layout: Layout, n: int, dim: int, seed: int = 0) -> Codes:
    draw = torch.Generator().manual_seed(seed)
    bits = CODE_BITS[layout]

    def codes(b: int) -> torch.Tensor:
        return torch.randint(0, 1 << b, (n, PAGE_TOKENS, dim), generator=draw, dtype=torch.uint8)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).bfloat16()

    parts = dim // partition_channels(dim)
    return Codes(
        codes(bits.k),
        values(n, dim),
        values(n, dim),
        codes(bits.v),
        values(n, parts, PAGE_TOKENS),
        values(n, parts, PAGE_TOKENS),
    )


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("dim", [16, 64, 96, 128, 256])
def test_tiles_come_back_as_they_were(layout: Layout, dim: int) -> None:
    codes = random_codes(layout, 3, dim)
    tiles = pack_codes(codes, layout)
    assert tiles.shape == (3, coded_tile_bytes(layout, dim))
    back = unpack_codes(tiles, layout, dim)
    for name in Codes.__slots__:
        assert torch.equal(getattr(back, name), getattr(codes, name)), name


@pytest.mark.parametrize("layout", CODED)
def test_a_code_lies_where_the_layout_says(layout: Layout) -> None:
    dim, token, channel = 128, 37, 77
    codes = random_codes(layout, 1, dim)
    tile = pack_codes(codes, layout)[0].tolist()
    k_bits, v_bits = CODE_BITS[layout]

    def field(base: int, line: int, lane: int, along: int, bits: int) -> int:
        within = along % (32 // bits)
        byte = tile[base + (line * 16 + lane) * 4 + within % 4]
        return int(byte >> within // 4 * bits & ((1 << bits) - 1))

    per_k, per_v = 32 // k_bits, 32 // v_bits
    k_line = token // 16 * (dim // per_k) + channel // per_k
    assert field(0, k_line, token % 16, channel, k_bits) == codes.k[0, token, channel]
    base = PAGE_TOKENS * dim * k_bits // 8 + 4 * dim
    v_line = token // per_v * (dim // 16) + channel // 16
    assert field(base, v_line, channel % 16, token, v_bits) == codes.v[0, token, channel]


def test_two_bits_take_less_than_a_sixth_of_sixteen() -> None:
    assert coded_tile_bytes(Layout.K2V2, 128) / (2 * PAGE_TOKENS * 128 * 2) == 0.15625


def test_partitions_divide_the_head() -> None:
    found = [partition_channels(dim) for dim in (16, 32, 64, 80, 96, 112, 128, 256)]
    assert found == [16, 32, 64, 16, 48, 16, 64, 64]


def test_sinks_come_back_as_they_were() -> None:
    k, v = torch.randn(2, 5, SINK_TOKENS, 96).bfloat16().unbind()
    area = pack_sinks(k, v)
    assert area.shape == (5, sink_bytes(96))
    back = unpack_sinks(area, 96)
    assert torch.equal(back[0], k)
    assert torch.equal(back[1], v)
