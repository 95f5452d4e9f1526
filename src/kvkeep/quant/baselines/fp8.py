"""fp8: e4m3 codes with one float32 scale per tile of keys and of values."""

from __future__ import annotations

from typing import Final

import torch

from kvkeep.quant.baselines.base import KV, Baseline, Fields, joined
from kvkeep.quant.codec import KVShape, Place
from kvkeep.types import PAGE_TOKENS

_LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max


class Fp8(Baseline):
    """Eight-bit floats."""

    name = "fp8"

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return scales, then codes."""
        x = torch.stack([k, v]).float()
        scale = x.abs().amax((2, 3), keepdim=True) / _LARGEST
        scale = torch.where(scale == 0, 1.0, scale)
        return joined([scale, (x / scale).to(torch.float8_e4m3fn)])

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return scale times code."""
        fields, heads = Fields(blob), shape.num_kv_heads
        scale = fields.take(torch.float32, 2, heads, 1, 1)
        codes = fields.take(torch.float8_e4m3fn, 2, heads, PAGE_TOKENS, shape.head_dim)
        k, v = (codes.float() * scale).unbind()
        return k, v
