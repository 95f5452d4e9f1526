"""Every path that attends on this machine."""

from __future__ import annotations

from typing import Literal

from kvkeep.ops.cpu import CpuKernel, available, cpu_ops
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import AttentionOps
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import Layout

Path = CpuKernel | Literal["reference"]
PATHS: list[Path] = ["reference", *available()]
LAYOUTS = [Layout.F32, Layout.BF16]


def cpu_attention(path: CpuKernel, threads: int = 1) -> CpuAttention:
    attention = cpu_ops(path, threads).attention
    assert isinstance(attention, CpuAttention)
    return attention


def ops_for(path: Path, threads: int = 1) -> AttentionOps:
    return ReferenceAttention() if path == "reference" else cpu_attention(path, threads)
