"""Pages that look like a model's: channels with a middle of their own, neighbours alike."""

from __future__ import annotations

import torch

from kvkeep.quant.baselines.base import KV
from kvkeep.types import PAGE_TOKENS

HEADS, DIM, LAYERS = 2, 64, 3


def page(seed: int = 0, *, dim: int = DIM) -> KV:
    draw = torch.Generator().manual_seed(seed)
    middles = 4 * torch.randn((HEADS, 1, dim), generator=torch.Generator().manual_seed(99))
    drift = torch.randn((HEADS, PAGE_TOKENS, dim), generator=draw).cumsum(1) / 4
    k = middles + drift + torch.randn((HEADS, PAGE_TOKENS, dim), generator=draw) / 4
    return k.bfloat16(), torch.randn((HEADS, PAGE_TOKENS, dim), generator=draw).bfloat16()


def sample(pages: int = 3, *, dim: int = DIM) -> list[list[KV]]:
    return [[page(100 * layer + i, dim=dim) for i in range(pages)] for layer in range(LAYERS)]


def plain(value: float) -> KV:
    k, v = (torch.full((HEADS, PAGE_TOKENS, DIM), value).bfloat16() for _ in range(2))
    return k, v
