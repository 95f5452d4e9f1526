"""hack-paper: two-bit codes along the sums, rounded at random, with the sums of codes stored.

Both operands have their scales along the axis that attention adds over: keys per token over a
partition of channels, values per channel over the page. The product of two such operands needs the
sums of their codes; those of keys and values are stored with them.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

import torch

from kvkeep.ops.codes import partition_channels
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


class Summed(NamedTuple):
    """Partitions of operands along their sum: x = scale * code + least."""

    codes: torch.Tensor
    """[..., n] uint8."""
    scale: torch.Tensor
    """[..., 1] bfloat16, as is `least`."""
    least: torch.Tensor
    sums: torch.Tensor
    """[..., 1] uint8 sums of codes."""

    def values(self) -> torch.Tensor:
        """Return float32 what the codes stand for."""
        return self.scale.float() * self.codes + self.least.float()


class HackPaper(Baseline):
    """Scales along the sums; the seed decides how values between two codes are rounded."""

    name = "hack-paper"

    def __init__(self, seed: int = 0, *, stochastic: bool = True) -> None:
        self._seed = seed
        self._stochastic = stochastic

    def operands(self, k: torch.Tensor, v: torch.Tensor) -> tuple[Summed, Summed]:
        """Return keys [N, S, NP, KP] and values [N, D, S]."""
        n, tokens, dim = k.shape
        parts = k.float().reshape(n, tokens, -1, partition_channels(dim))
        draw = self._generator(k, v) if self._stochastic else None
        return _summed(parts, draw), _summed(v.float().transpose(1, 2), draw)

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return keys, then values: scales, least values, sums, codes."""
        return b"".join(
            joined([one.scale, one.least, one.sums, pack_bits(one.codes, _BITS)])
            for one in self.operands(k, v)
        )

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return scale times code plus least value."""
        heads, dim = shape.num_kv_heads, shape.head_dim
        part = partition_channels(dim)
        fields = Fields(blob)
        keys = _read(fields, (heads, PAGE_TOKENS, dim // part, part)).values()
        values = _read(fields, (heads, dim, PAGE_TOKENS)).values()
        return keys.view(heads, PAGE_TOKENS, dim), values.transpose(1, 2)

    def _generator(self, k: torch.Tensor, v: torch.Tensor) -> torch.Generator:
        """Return a stream that depends on the seed and the page alone."""
        digest = hashlib.blake2b(joined([k, v]), digest_size=7, salt=self._seed.to_bytes(8))
        return torch.Generator().manual_seed(int.from_bytes(digest.digest()))


def _summed(x: torch.Tensor, draw: torch.Generator | None) -> Summed:
    levels = (1 << _BITS) - 1
    least, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least_stored = least.to(torch.bfloat16)
    scale = ((high - least) / levels).to(torch.bfloat16)
    scale = torch.where(scale == 0, 1.0, scale).to(torch.bfloat16)
    exact = (x - least_stored.float()) / scale.float()
    if draw is None:
        rounded = exact.round()
    else:
        rounded = (exact + torch.rand(exact.shape, generator=draw)).floor()
    codes = rounded.clamp(0, levels).to(torch.uint8)
    return Summed(codes, scale, least_stored, codes.sum(-1, keepdim=True, dtype=torch.uint8))


def _read(fields: Fields, shape: tuple[int, ...]) -> Summed:
    groups = (*shape[:-1], 1)
    scale, least = (fields.take(torch.bfloat16, *groups) for _ in range(2))
    sums = fields.take(torch.uint8, *groups)
    count = scale.numel() * shape[-1]
    packed = fields.take(torch.uint8, count * _BITS // 8)
    return Summed(unpack_bits(packed, _BITS).view(shape), scale, least, sums)
