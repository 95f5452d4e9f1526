"""What an engine runs on: kernels, where its tiles are, how a step's arrays get there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kvkeep import ops
from kvkeep.attention import cost
from kvkeep.attention.cost import CostModel
from kvkeep.attention.profile import ON_CPU, Timing, on_device
from kvkeep.cache.storage import DeviceTiles, HostTiles, StorageMaker
from kvkeep.engine.options import EngineOptions
from kvkeep.ops.device import TRITON, programs_of
from kvkeep.ops.upload import Uploader

Upload = Callable[[Sequence[np.ndarray[Any, np.dtype[Any]]]], list[torch.Tensor]]
"""Brings a step's arrays to the model; what it returns is valid until the next call."""


@dataclass(frozen=True, slots=True)
class Backend:
    """Chosen once, in `choose`."""

    ops: ops.Ops
    storage: StorageMaker
    upload: Upload
    torch_threads: int
    costs: CostModel | None
    """The planner's costs where they are not measured at start."""
    parallel: int
    """Threads, or programs of a device, that attend at once."""
    timing: Timing = ON_CPU
    """How the kernels are timed where they are."""


def choose(options: EngineOptions, threads: int) -> Backend:
    """Return what the options ask for; raises `ConfigError` where this machine can't."""
    kernels = ops.select(options.kernel, threads, options.device)
    if kernels.name == TRITON:
        there = kernels.device
        storage = partial(DeviceTiles, device=there)
        programs, upload = programs_of(there), Uploader(there)
        if there.type == "cuda":
            return Backend(kernels, storage, upload, 1, None, programs, on_device(there))
        return Backend(kernels, storage, upload, 1, cost.DEVICE_SEED, programs)
    if kernels.name == "reference":
        return Backend(kernels, HostTiles, _as_tensors, threads, cost.SEED, threads)
    return Backend(kernels, HostTiles, _as_tensors, 1, None, threads)


def _as_tensors(arrays: Sequence[np.ndarray[Any, np.dtype[Any]]]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]
