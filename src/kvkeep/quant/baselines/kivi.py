"""kivi2: two bits, keys per channel over 32 tokens, values per token over 32 channels."""

from __future__ import annotations

from typing import Final

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

_GROUP: Final = 32
_BITS: Final = 2


class Kivi(Baseline):
    """Two bits with a 16-bit scale and least value per group."""

    name = "kivi2"

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return scales, least values and codes of keys by channel, then of values by token."""
        x = torch.stack([k.transpose(1, 2).reshape(-1, _GROUP), v.reshape(-1, _GROUP)]).float()
        least, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
        scale = (high - least) / ((1 << _BITS) - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        codes = ((x - least) / scale).round().clamp(0, (1 << _BITS) - 1).to(torch.uint8)
        return joined([scale.half(), least.half(), pack_bits(codes, _BITS)])

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return scale times code plus least value."""
        fields, heads, dim = Fields(blob), shape.num_kv_heads, shape.head_dim
        groups = heads * PAGE_TOKENS * dim // _GROUP
        scale, least = (fields.take(torch.float16, 2, groups, 1).float() for _ in range(2))
        packed = fields.take(torch.uint8, 2 * groups * _GROUP * _BITS // 8)
        x = unpack_bits(packed, _BITS).view(2, groups, _GROUP) * scale + least
        keys = x[0].reshape(heads, dim, PAGE_TOKENS).transpose(1, 2)
        return keys, x[1].reshape(heads, PAGE_TOKENS, dim)
