"""Triton's kernels for tests: on a CUDA device where there is one, else through the interpreter."""

from __future__ import annotations

from typing import Final, Literal

import torch

from kvkeep.ops.layout import Attended, AttentionPlan, LayerKV, Observe
from kvkeep.ops.triton_attention import TritonAttention
from kvkeep.types import Int32Array, Layout
from tests.oracles import Heads, World, make_world

DEVICE: Final[Literal["cuda", "cpu"]] = "cuda" if torch.cuda.is_available() else "cpu"

ROW_LAYOUTS: Final = [Layout.ROWS_F32, Layout.ROWS_F16]
"""What the interpreter computes rightly; bfloat16 is tested on a device."""


class OnDevice:
    """`TritonAttention` that takes tensors of the host and gives its results back there."""

    def __init__(self, programs: int = 16, *, decode: bool = False) -> None:
        self.inner = TritonAttention(torch.device(DEVICE), programs, decode=decode)

    @property
    def bytes_read(self) -> int:
        return self.inner.bytes_read

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        self.inner.append(kv, k.to(DEVICE), v.to(DEVICE), slots)

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        got = self.inner.attend(q.to(DEVICE), kv, plan, observe)
        return Attended(got.out.cpu(), got.lse2.cpu(), got.hits, got.stamps)

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse2 = self.inner.merge(outs.to(DEVICE), lse2s.to(DEVICE))
        return out.cpu(), lse2.cpu()


def world_of(heads: Heads, layout: Layout, pages: int, seed: int = 0) -> World:
    """Return an empty pool of poisoned tiles on the device."""
    return make_world(heads, layout, pages=pages, seed=seed, device=DEVICE)
