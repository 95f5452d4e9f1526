"""Memory as a pool of pages has it."""

from __future__ import annotations

import mmap

import torch


def huge(size: int) -> torch.Tensor:
    """Return memory in huge pages where the system has them, as a pool's is."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
