"""The seam to the hardware: one signature per kernel, chosen once by `select`."""

from __future__ import annotations

from typing import Literal

from kvkeep.errors import ConfigError
from kvkeep.ops.cpu import available, cpu_ops
from kvkeep.ops.cpu_leaf import CpuLeaf
from kvkeep.ops.layout import (
    Attended,
    AttentionOps,
    AttentionPlan,
    LayerKV,
    LeafOps,
    Observe,
    Ops,
    PackedWeight,
    Run,
    SampleOps,
    validate,
)
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.ops.reference_leaf import ReferenceLeaf
from kvkeep.ops.reference_sample import ReferenceSample

__all__ = [
    "Attended",
    "AttentionOps",
    "AttentionPlan",
    "CpuLeaf",
    "Kernel",
    "LayerKV",
    "LeafOps",
    "Observe",
    "Ops",
    "PackedWeight",
    "Run",
    "SampleOps",
    "available",
    "select",
    "validate",
]

Kernel = Literal["auto", "avx512", "avx2", "portable", "reference"]


def select(kernel: Kernel, threads: int) -> Ops:
    """Return the kernels of one path; 'auto' takes the fastest this CPU runs."""
    if threads < 1:
        raise ConfigError(f"threads: {threads} must be at least 1")
    if kernel == "reference":
        return Ops(kernel, ReferenceAttention(), ReferenceLeaf(), ReferenceSample())
    return cpu_ops(available()[0] if kernel == "auto" else kernel, threads)
