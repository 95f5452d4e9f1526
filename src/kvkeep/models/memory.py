"""Does a checkpoint fit into memory? Asked before loading: later the system kills the process."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from kvkeep.errors import ConfigError
from kvkeep.models.checkpoint import Checkpoint
from kvkeep.ops import free_bytes

MEMINFO = Path("/proc/meminfo")
GIB = 1 << 30


def available_bytes(meminfo: Path = MEMINFO) -> int | None:
    """Return the memory free for use without swapping; None where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def free_on(device: torch.device) -> int | None:
    """Return the memory free for weights and pages on a device, or on this machine."""
    found = free_bytes(device)
    return available_bytes() if found is None else found


def check_fits(
    checkpoint: Checkpoint,
    free: int | None,
    *,
    embedding: str,
    tied: bool,
    element_bytes: int,
    packed_bytes: int,
) -> None:
    """Raise `ConfigError` where packed weights and a plain embedding exceed what is free."""
    sizes = {name: math.prod(stored.shape) for name, stored in checkpoint.tensors.items()}
    rows = sizes.get(embedding, 0)
    packed = sum(sizes.values()) - (0 if tied else rows)
    needed = rows * element_bytes + packed * packed_bytes
    if free is not None and needed > free:
        raise ConfigError(
            f"the weights of {checkpoint.path} need {needed / GIB:.1f} GiB, "
            f"{free / GIB:.1f} GiB of memory are free; choose a smaller model or --weights int8"
        )
