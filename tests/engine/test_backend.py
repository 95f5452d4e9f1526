"""What an engine runs on, as its options have it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from kvkeep.attention import cost
from kvkeep.attention.profile import ON_CPU
from kvkeep.cache.storage import DeviceTiles, HostTiles
from kvkeep.engine.backend import choose
from kvkeep.engine.options import EngineOptions
from kvkeep.ops.upload import Uploader
from tests.ops.devices import DEVICE


def test_a_cpus_kernels_read_host_memory_and_measure_their_costs() -> None:
    backend = choose(EngineOptions(model="m"), 2)
    assert backend.ops.device == torch.device("cpu")
    assert backend.storage is HostTiles
    assert backend.costs is None
    assert (backend.torch_threads, backend.parallel) == (1, 2)
    assert backend.timing is ON_CPU
    ids = np.arange(3)
    assert backend.upload([ids])[0].data_ptr() == ids.ctypes.data


def test_the_reference_runs_torch_on_all_threads() -> None:
    backend = choose(EngineOptions(model="m", kernel="reference"), 2)
    assert (backend.torch_threads, backend.parallel, backend.costs) == (2, 2, cost.SEED)


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_an_interpreted_devices_tiles_and_arrays_are_its_own() -> None:
    backend = choose(EngineOptions(model="m", kernel="triton"), 2)
    assert isinstance(backend.storage, partial)
    assert backend.storage.func is DeviceTiles
    assert isinstance(backend.upload, Uploader)
    assert backend.parallel >= 16
    assert backend.costs == cost.DEVICE_SEED, "the interpreter's time is nobody's"


@pytest.mark.gpu
def test_a_gpus_costs_are_measured() -> None:
    backend = choose(EngineOptions(model="m", kernel="triton", device="cuda"), 2)
    assert backend.costs is None
    assert backend.timing.wait is not None


@pytest.mark.parametrize(("rows", "shared"), [(64, 4096), (16, 16_384)])
def test_a_devices_costs_share_a_long_prefix(rows: int, shared: int) -> None:
    apart = rows * cost.DEVICE_SEED.ns(4, shared)
    together = cost.DEVICE_SEED.ns(4 * rows, shared) + rows * cost.DEVICE_SEED.ns(
        4, 64, merges=True
    )
    assert together < 0.2 * apart
