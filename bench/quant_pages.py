"""Pages of random numbers in any order, more than a cache holds, and how fast a row reads them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from bench.memory import huge
from kvkeep.ops.codes import pack_codes, pack_sinks, tile_bytes
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import AttentionPlan, LayerKV, Run
from kvkeep.types import PAGE_TOKENS, Layout
from tests.coded import random_codes

COLD_BYTES: Final = 96 << 20
KV_HEADS: Final = 8
UNIT: Final = 64


@dataclass(frozen=True)
class Pages:
    """Layers of one context that together leave the caches, and the plan of a row at its end."""

    layers: list[LayerKV]
    plan: AttentionPlan


def sample_tiles(layout: Layout, dim: int, *, first: bool) -> torch.Tensor:
    """Return tiles [64, bytes] of random numbers."""
    if layout == Layout.BF16:
        numbers = torch.randn(64, 2 * PAGE_TOKENS * dim).to(torch.bfloat16)
        return numbers.view(torch.uint8)
    tiles = pack_codes(random_codes(np.random.default_rng(0), layout, 64, dim), layout)
    if not first:
        return tiles
    k, v = torch.randn(2, 64, 4, dim)
    return torch.cat([tiles, pack_sinks(k, v)], 1)


def pages_of(layout: Layout, dim: int, context: int, cold_bytes: int = COLD_BYTES) -> Pages:
    """Return layers of one context, their tiles in any order, in huge memory pages."""
    count = context // PAGE_TOKENS
    sizes = [tile_bytes(layout, dim, first=True), tile_bytes(layout, dim)]
    layer_bytes = KV_HEADS * (sizes[0] + (count - 1) * sizes[1])
    layers = -(-cold_bytes // layer_bytes)
    memory = huge(layers * layer_bytes)
    table = np.empty((count, layers, KV_HEADS), np.int32)
    rng, begin = np.random.default_rng(0), 0
    for rows, size in ((slice(0, 1), sizes[0]), (slice(1, None), sizes[1])):
        part = table[rows]
        ids = rng.permutation(part.size) * (size // UNIT) + begin // UNIT
        part[...] = ids.reshape(part.shape)
        sample = sample_tiles(layout, dim, first=rows.start == 0)
        tiles = memory[begin : begin + part.size * size].view(-1, size)
        for at in range(0, len(tiles), len(sample)):
            tiles[at : at + len(sample)] = sample[: len(tiles) - at]
        begin += part.size * size
    plan = AttentionPlan(
        np.array([context - 1], np.int32),
        np.array([[0, 1, 0, 1]], np.int32),
        np.array([Run(0, count, 0, int(layout))], np.int32),
        np.arange(count, dtype=np.int32),
    )
    found = [LayerKV(memory, table, UNIT, layer, KV_HEADS, dim) for layer in range(layers)]
    return Pages(found, plan)


def ns_per_token(side: tuple[CpuAttention, Pages], q: torch.Tensor, seconds: float) -> float:
    """Return nanoseconds per token and KV head of passes over all layers."""
    ops, pages = side
    rounds, begun = 0, time.perf_counter()
    while rounds == 0 or time.perf_counter() - begun < seconds:
        for kv in pages.layers:
            ops.attend(q, kv, pages.plan)
        rounds += 1
    taken = time.perf_counter() - begun
    tokens = len(pages.plan.pages) * PAGE_TOKENS
    return taken * 1e9 / (rounds * len(pages.layers) * tokens * KV_HEADS)
