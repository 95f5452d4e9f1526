"""The published form of attention on codes, in torch: what its two eliminations save.

Both operands of a product have their scales along its sum, so a product needs the sums of either
side's codes. Integers are held in float32, whose products and sums of them are exact. With `stored`
the sums of keys' and values' codes are read; without, they are one more row of the product, the
cheapest way there is of making them again. With `open` the tokens that don't fill a block yet stay
in floats; without, that block is coded anew with every token, from its own codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvkeep.ops.codes import partition_channels
from kvkeep.quant.baselines.paper import HackPaper, Summed
from kvkeep.types import PAGE_TOKENS

_TOP = 255


class Operand(NamedTuple):
    """x = scale * code + least along the last axis; all float32."""

    codes: torch.Tensor
    """[..., n]."""
    scale: torch.Tensor
    """[..., 1], as are `least` and `sums`."""
    least: torch.Tensor
    sums: torch.Tensor


def held(one: Summed) -> Operand:
    """Return a codec's partitions as float32."""
    return Operand(*(x.float() for x in one))


def eight_bits(x: torch.Tensor) -> Operand:
    """Return x [..., n] in 256 steps from its least to its largest."""
    least, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - least) / _TOP
    scale = torch.where(scale == 0, 1.0, scale)
    codes = ((x - least) / scale).round()
    return Operand(codes, scale, least, codes.sum(-1, keepdim=True))


def product(a: Operand, b: Operand, *, stored: bool) -> torch.Tensor:
    """Return a [..., M, n] times b [..., N, n], [..., M, N], as their codes stand for."""
    n, rows = a.codes.shape[-1], a.codes.shape[-2]
    if stored:
        integers, sums = a.codes @ b.codes.mT, b.sums
    else:
        ones = torch.ones_like(a.codes[..., :1, :])
        both = torch.cat([a.codes, ones], -2) @ b.codes.mT
        integers, sums = both[..., :rows, :], both[..., rows:, :].mT
    first = (integers * b.scale.mT + a.sums * b.least.mT) * a.scale
    return first + a.least * (sums * b.scale + n * b.least).mT


@dataclass(frozen=True, slots=True)
class PaperStep:
    """One layer of a decoding row: N KV heads, B closed blocks of S tokens, one open block."""

    k: Operand
    """codes [N, NP, B S, KP]."""
    v: Operand
    """codes [N, B, D, S]."""
    open_k: torch.Tensor
    """[N, S / 2, D] float32, as is `open_v`."""
    open_v: torch.Tensor
    open_codes: Summed
    """Of `open_v`, [N, D, S / 2]."""

    def attend(self, q: torch.Tensor, *, stored: bool, open_block: bool) -> torch.Tensor:
        """Return outputs [N, G, D] of q [N, G, D]."""
        num_heads, group, dim = q.shape
        parts = q.view(num_heads, group, -1, partition_channels(dim)).transpose(1, 2)
        closed = product(eight_bits(parts), self.k, stored=stored).sum(1)
        scores = torch.cat([closed, q @ self.open_k.mT], 2) / dim**0.5
        weights = scores.softmax(-1)
        count = closed.shape[2]
        blocks = weights[..., :count].reshape(num_heads, group, -1, PAGE_TOKENS).transpose(1, 2)
        out: torch.Tensor = product(eight_bits(blocks), self.v, stored=stored).sum(1)
        late = weights[..., count:]
        if open_block:
            out += late @ self.open_v
            return out
        back = self.open_codes.values()
        back[..., -1] = self.open_v[:, -1]
        again = held(HackPaper(stochastic=False).operands(self.open_k, back.mT)[1])
        out += product(eight_bits(late), again, stored=stored)
        return out


def paper_step(num_heads: int, tokens: int, dim: int) -> PaperStep:
    """Return a step over `tokens` closed tokens of normal numbers and half a block."""
    draw = torch.Generator().manual_seed(0)
    codec = HackPaper(stochastic=False)
    k, v = torch.randn(2, num_heads, tokens, dim, generator=draw)
    keys = codec.operands(k, v)[0]
    by_block = v.reshape(-1, PAGE_TOKENS, dim)
    values = codec.operands(by_block, by_block)[1]
    open_k, open_v = torch.randn(2, num_heads, PAGE_TOKENS // 2, dim, generator=draw)
    return PaperStep(
        k=Operand(*(x.transpose(1, 2).contiguous() for x in held(keys))),
        v=Operand(*(x.view(num_heads, -1, *x.shape[1:]) for x in held(values))),
        open_k=open_k,
        open_v=open_v,
        open_codes=codec.operands(open_k, open_v)[1],
    )
