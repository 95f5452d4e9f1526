"""Attention that widens codes first: slow, but fast enough for whole engines, and no kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from kvkeep import ops
from kvkeep.cache.storage import HostTiles
from kvkeep.engine.backend import Backend
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.layout import (
    Attended,
    AttentionOps,
    AttentionPlan,
    LayerKV,
    Observe,
    Run,
    chains,
)
from kvkeep.quant.codec import Float, KVShape
from kvkeep.quant.hack import Hack
from kvkeep.types import Layout


class DecodedAttention:
    """Rows one at a time, in float64 over what the tiles stand for; appends like `inner`."""

    def __init__(self, inner: AttentionOps) -> None:
        self.append, self.merge = inner.append, inner.merge
        self.bytes_read = 0

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        assert observe is None
        out, lse2 = torch.empty_like(q), torch.empty(q.shape[:2])
        grouped = q.double().view(len(q), kv.num_kv_heads, -1, kv.head_dim)
        for rows, runs in chains(plan):
            k, v = _tokens(kv, plan, runs)
            for row in rows:
                count = int(plan.row_positions[row]) + 1
                for head in range(kv.num_kv_heads):
                    scores = grouped[row, head] @ k[head, :count].T / math.sqrt(kv.head_dim)
                    heads = slice(head * len(scores), (head + 1) * len(scores))
                    out[row, heads] = (scores.softmax(1) @ v[head, :count]).to(q.dtype)
                    lse2[row, heads] = (scores.logsumexp(1) / math.log(2)).float()
        return Attended(out, lse2, None)


def _tokens(kv: LayerKV, plan: AttentionPlan, runs: list[Run]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 k, v [Hkv, n, D] of the runs' pages."""
    parts = []
    for run in runs:
        layout = Layout(run.layout)
        for i in range(run.page_count):
            first = run.first_position == 0 and i == 0
            slot = int(plan.pages[run.page_begin + i])
            parts.append(_page(kv, slot, layout, first=first))
    k, v = (torch.cat(x, 1).double() for x in zip(*parts, strict=True))
    return k.contiguous(), v.contiguous()


def _page(
    kv: LayerKV, slot: int, layout: Layout, *, first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    size = tile_bytes(layout, kv.head_dim, first=first)
    begins = kv.tile_table[slot, kv.layer].astype(np.int64) * kv.unit_bytes
    tiles = np.stack([kv.buffer.numpy()[begin : begin + size] for begin in begins])
    float_layout = layout if layout in (Layout.F32, Layout.BF16) else Layout.F32
    shape = KVShape(1, kv.num_kv_heads, kv.head_dim, float_layout)
    codec = Float() if layout == float_layout else Hack(layout)
    return codec.decode(tiles, shape, first=first)


def decoded_backend(threads: int = 2) -> Backend:
    """Return a CPU backend whose attention is `DecodedAttention`."""
    native = ops.select("auto", threads, "cpu")
    kernels = replace(native, attention=DecodedAttention(native.attention))
    return Backend(
        kernels, HostTiles, lambda arrays: [torch.from_numpy(a) for a in arrays], 1, None
    )
