"""Coded tiles: the byte order of pages whose keys and values are small unsigned integers.

A coded tile stands for k[t, d] = k_scale[d] * k_code[t, d] + k_min[d] and, with h the partition of
channel d, v[t, d] = v_scale[h, t] * v_code[t, d] + v_min[h, t]. `KP` channels make up a partition
and `NP` = D / KP partitions a row. With b bits a byte holds F = 8 / b codes; field i is bits
[b i, b i + b). In order:

  K codes  [S/16][D/4F][16][4]  byte (t, j, lane, beta), field i: token 16 t + lane,
                                channel 4F j + 4 i + beta
  K scale  [D] bfloat16
  K min    [D] bfloat16
  V codes  [S/4F][D/16][16][4]  byte (r, c, lane, beta), field i: channel 16 c + lane,
                                token 4F r + 4 i + beta
  V scale  [NP][S] bfloat16
  V min    [NP][S] bfloat16
  padding to a multiple of 64 bytes

Four bytes side by side lie along the sum that a product of bytes takes (K: channels, V: tokens),
and a mask alone isolates a field. The tile of a sequence's first page is followed by its sinks, the
first `SINK_TOKENS` tokens, whose own codes mean nothing:

  K [SINK_TOKENS][D] bfloat16, V [SINK_TOKENS][D] bfloat16, padding to a multiple of 64 bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from kvkeep.ops.layout import float_tile_bytes
from kvkeep.types import PAGE_TOKENS, Layout

SINK_TOKENS: Final = 4
"""First tokens of a sequence that stay in 16 bits."""

LANES: Final = 16
_PARTITION: Final = 64
_ALIGN: Final = 64
_MASKS: Final = {
    bits: int.from_bytes(bytes(4 * [(1 << bits) - 1]), "little", signed=True) for bits in (2, 4, 8)
}
"""Four bytes of a code each, as one."""


class Bits(NamedTuple):
    """Bits of one key and one value code."""

    k: int
    v: int


CODE_BITS: Final = {
    Layout.K2V2: Bits(2, 2),
    Layout.K4V2: Bits(4, 2),
    Layout.K4V4: Bits(4, 4),
    Layout.K8V8: Bits(8, 8),
}
"""Bits of every coded layout."""


@dataclass(frozen=True, slots=True)
class Codes:
    """N tiles taken apart."""

    k: torch.Tensor
    """[N, S, D] uint8 codes."""
    k_scale: torch.Tensor
    """[N, D] bfloat16, as is `k_min`."""
    k_min: torch.Tensor
    v: torch.Tensor
    """[N, S, D] uint8 codes."""
    v_scale: torch.Tensor
    """[N, NP, S] bfloat16, as is `v_min`."""
    v_min: torch.Tensor


def partition_channels(head_dim: int) -> int:
    """Return KP: the largest multiple of 16 up to 64 that divides `head_dim`."""
    return next(n for n in range(min(_PARTITION, head_dim), 0, -LANES) if head_dim % n == 0)


def coded_tile_bytes(layout: Layout, head_dim: int) -> int:
    """Return the bytes of a coded tile without sinks."""
    bits = CODE_BITS[layout]
    partitions = head_dim // partition_channels(head_dim)
    codes = PAGE_TOKENS * head_dim * (bits.k + bits.v) // 8
    return _aligned(codes + 4 * head_dim + 4 * partitions * PAGE_TOKENS)


def tile_bytes(layout: Layout, head_dim: int, *, first: bool = False) -> int:
    """Return the bytes of a tile in any layout; `first`: of the page at position 0."""
    if layout not in CODE_BITS:
        return float_tile_bytes(layout, head_dim)
    return coded_tile_bytes(layout, head_dim) + (sink_bytes(head_dim) if first else 0)


def sink_bytes(head_dim: int) -> int:
    """Return the bytes of the sinks that follow the tile of a sequence's first page."""
    return _aligned(2 * SINK_TOKENS * head_dim * 2)


def pack_codes(codes: Codes, layout: Layout) -> torch.Tensor:
    """Return tiles [N, tile bytes] uint8."""
    bits = CODE_BITS[layout]
    n, _, dim = codes.k.shape
    parts = [
        _pack_lanes(codes.k, bits.k),
        _bytes(codes.k_scale),
        _bytes(codes.k_min),
        _pack_lanes(codes.v.transpose(1, 2), bits.v, lanes_first=False),
        _bytes(codes.v_scale),
        _bytes(codes.v_min),
    ]
    packed = torch.cat(parts, 1)
    padding = coded_tile_bytes(layout, dim) - packed.shape[1]
    return torch.nn.functional.pad(packed, (0, padding)).view(n, -1)


def unpack_codes(tiles: torch.Tensor, layout: Layout, head_dim: int) -> Codes:
    """Return the parts of tiles [N, tile bytes or more] uint8; the inverse of `pack_codes`."""
    bits = CODE_BITS[layout]
    n, dim = len(tiles), head_dim
    partitions = dim // partition_channels(dim)
    at = 0

    def take(count: int) -> torch.Tensor:
        nonlocal at
        at += count
        return tiles[:, at - count : at].contiguous()

    k = _unpack_lanes(take(PAGE_TOKENS * dim * bits.k // 8), bits.k, PAGE_TOKENS)
    k_scale, k_min = (take(2 * dim).view(torch.bfloat16) for _ in range(2))
    v = _unpack_lanes(take(PAGE_TOKENS * dim * bits.v // 8), bits.v, dim, lanes_first=False)
    v_scale, v_min = (
        take(2 * partitions * PAGE_TOKENS).view(torch.bfloat16).view(n, partitions, PAGE_TOKENS)
        for _ in range(2)
    )
    return Codes(k, k_scale, k_min, v.transpose(1, 2), v_scale, v_min)


def pack_sinks(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the side area [N, sink bytes] uint8 of sinks k, v [N, SINK_TOKENS, D]."""
    packed = torch.cat([_bytes(x.to(torch.bfloat16)) for x in (k, v)], 1)
    return torch.nn.functional.pad(packed, (0, sink_bytes(k.shape[2]) - packed.shape[1]))


def unpack_sinks(area: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k, v [N, SINK_TOKENS, D] bfloat16 of a side area; the inverse of `pack_sinks`."""
    count = SINK_TOKENS * head_dim
    values = area[:, : 4 * count].contiguous().view(torch.bfloat16)
    k, v = values.view(len(area), 2, SINK_TOKENS, head_dim).unbind(1)
    return k, v


def _pack_lanes(codes: torch.Tensor, bits: int, *, lanes_first: bool = True) -> torch.Tensor:
    """Return the bytes [N, -1] of codes [N, X, Y]: X in lanes of 16, Y in fields and fours.

    Lines are ordered by X, then Y; with `lanes_first` False by Y, then X.
    """
    n, x, y = codes.shape
    fields = 8 // bits
    lines = (n, x // LANES, LANES, y // (4 * fields), fields)
    fours = codes.contiguous().view(torch.int32).view(lines)  # bytes shifted as one: none overflows
    packed = fours[..., 0].clone()  # [N, x, lane, y]
    for field in range(1, fields):
        packed |= fours[..., field] << bits * field
    order = (0, 1, 3, 2) if lanes_first else (0, 3, 1, 2)
    return packed.permute(order).contiguous().view(n, -1).view(torch.uint8)


def _unpack_lanes(
    packed: torch.Tensor, bits: int, x: int, *, lanes_first: bool = True
) -> torch.Tensor:
    """Return codes [N, X, Y] of their bytes [N, -1]; the inverse of `_pack_lanes`."""
    n, fields = len(packed), 8 // bits
    y = packed.shape[1] * fields // x
    lines = (x // LANES, y // (4 * fields))
    shape = lines if lanes_first else lines[::-1]
    order = (0, 1, 3, 2) if lanes_first else (0, 2, 3, 1)
    fours = packed.view(torch.int32).view(n, *shape, LANES).permute(order)  # [N, x, lane, y]
    codes = torch.empty((*fours.shape, fields), dtype=torch.int32, device=packed.device)
    for field in range(fields):  # bytes shifted as one: what comes from the next is masked
        torch.bitwise_and(fours >> bits * field, _MASKS[bits], out=codes[..., field])
    return codes.view(torch.uint8).view(n, x, y)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(len(values), -1).view(torch.uint8)


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
