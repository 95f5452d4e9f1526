"""The seam to the hardware: one signature per kernel, chosen once by `select`."""

from __future__ import annotations

import torch

from kvkeep.errors import ConfigError
from kvkeep.ops.checks import validate
from kvkeep.ops.cpu import available, cpu_ops
from kvkeep.ops.cpu_leaf import CpuLeaf
from kvkeep.ops.device import Device, device_ops, free_bytes
from kvkeep.ops.layout import (
    HOST,
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
)
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.ops.reference_leaf import ReferenceLeaf
from kvkeep.ops.reference_sample import ReferenceSample
from kvkeep.ops.turns import TorchTurn
from kvkeep.types import Kernel

__all__ = [
    "Attended",
    "AttentionOps",
    "AttentionPlan",
    "CpuLeaf",
    "Device",
    "Kernel",
    "LayerKV",
    "LeafOps",
    "Observe",
    "Ops",
    "PackedWeight",
    "Run",
    "SampleOps",
    "available",
    "free_bytes",
    "select",
    "validate",
]


def select(kernel: Kernel, threads: int, device: Device = "cpu") -> Ops:
    """Return the kernels of one path; 'auto' takes the fastest this CPU or device runs."""
    if threads < 1:
        raise ConfigError(f"threads: {threads} must be at least 1")
    if device == "cuda" and kernel not in {"auto", "triton"}:
        raise ConfigError(f"kernel: '{kernel}' runs on a CPU; leave it at 'auto' for {device}")
    if device == "cuda" or kernel == "triton":
        return device_ops(device)
    if kernel == "reference":
        turn = TorchTurn(HOST, torch.float64)
        attention = ReferenceAttention()
        leaf, sample = ReferenceLeaf(), ReferenceSample()
        return Ops(kernel, attention, leaf, sample, turn, parts=attention)
    return cpu_ops(available()[0] if kernel == "auto" else kernel, threads)
