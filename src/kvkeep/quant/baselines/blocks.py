"""q8_0 and q4_0: blocks of 32 channels of a token with one 16-bit scale, as those formats define.

q8_0  d = max |x| / 127, code round(x / d), halves away from 0; 34 bytes
q4_0  d = m / -8 with m the value of largest magnitude, code floor(x / d + 8.5) up to 15, the codes
      of the block's first half in the low bits; 18 bytes
"""

from __future__ import annotations

from typing import Final

import torch

from kvkeep.quant.baselines.base import KV, Baseline, Fields, joined
from kvkeep.quant.codec import KVShape, Place
from kvkeep.types import PAGE_TOKENS

_BLOCK: Final = 32


class Q8(Baseline):
    """Eight-bit blocks."""

    name = "q8_0"

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return [blocks, 2 + 32] bytes."""
        x = _blocks(k, v)
        scale = x.abs().amax(1, keepdim=True) / 127
        y = x * _inverse(scale)
        codes = torch.trunc(y + torch.copysign(torch.tensor(0.5), y)).to(torch.int8)
        return joined([torch.cat([_half(scale), codes.view(torch.uint8)], 1)])

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return scale times code."""
        raw = Fields(blob).take(torch.uint8, _count(shape), 2 + _BLOCK)
        return _tiles(raw[:, 2:].view(torch.int8).float() * _scale(raw), shape)


class Q4(Baseline):
    """Four-bit blocks."""

    name = "q4_0"

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return [blocks, 2 + 16] bytes."""
        x = _blocks(k, v)
        scale = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
        codes = (x * _inverse(scale) + 8.5).clamp(0, 15).to(torch.uint8)
        low, high = codes.view(-1, 2, _BLOCK // 2).unbind(1)
        return joined([torch.cat([_half(scale), low | high << 4], 1)])

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return scale times (code - 8)."""
        raw = Fields(blob).take(torch.uint8, _count(shape), 2 + _BLOCK // 2)
        codes = torch.cat([raw[:, 2:] & 15, raw[:, 2:] >> 4], 1)
        return _tiles((codes.float() - 8) * _scale(raw), shape)


def _blocks(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.stack([k, v]).float().view(-1, _BLOCK)


def _tiles(x: torch.Tensor, shape: KVShape) -> KV:
    k, v = x.view(2, shape.num_kv_heads, PAGE_TOKENS, shape.head_dim).unbind()
    return k, v


def _count(shape: KVShape) -> int:
    return 2 * shape.num_kv_heads * PAGE_TOKENS * shape.head_dim // _BLOCK


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(torch.float16).view(torch.uint8)


def _scale(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, :2].contiguous().view(torch.float16).float()
