"""Choose the backend of a device: Triton for attention, torch for the rest."""

from __future__ import annotations

import importlib.util
import os
from typing import Final, Literal

import torch

from kvkeep.errors import ConfigError
from kvkeep.ops.layout import ROW_LAYOUTS, Ops
from kvkeep.ops.torch_leaf import TorchLeaf
from kvkeep.ops.torch_sample import TorchSample
from kvkeep.ops.turns import TorchTurn

Device = Literal["cpu", "cuda"]

TRITON: Final = "triton"
"""The kernel's name."""

_PROGRAMS_PER_CORE: Final = 2
_INTERPRETED_PROGRAMS: Final = 16


def device_ops(device: Device) -> Ops:
    """Return Triton's kernels on a device; raises `ConfigError` where they can't run."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: 'cuda' needs a CUDA device that this torch can use, and there is none; "
            "use 'cpu'"
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"device: '{device}' with Triton needs it installed: kvkeep[cuda]")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "kernel: 'triton' needs a CUDA device: add --device cuda, or set TRITON_INTERPRET=1 "
            "to try it slowly on this CPU"
        )
    from kvkeep.ops.triton_attention import TritonAttention  # noqa: PLC0415 - Triton is optional

    there = torch.device(device)
    return Ops(
        TRITON,
        TritonAttention(there),
        TorchLeaf(there),
        TorchSample(there),
        TorchTurn(there),
        there,
        ROW_LAYOUTS,
    )


def programs_of(device: torch.device) -> int:
    """Return how many (task, KV head) programs keep a device busy."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_CORE * cores


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; None on a CPU, where the system is asked."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
