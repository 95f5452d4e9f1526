"""A pool over either storage: what is written is read, what is handed out is zero."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from kvkeep.cache.pool import TilePool
from kvkeep.cache.storage import DeviceTiles, HostTiles, StorageMaker, TileRange
from kvkeep.errors import ConfigError
from tests.cache.player import SPEC

HERE = torch.device("cpu")
STORAGES: dict[str, StorageMaker] = {"host": HostTiles, "device": partial(DeviceTiles, device=HERE)}


@pytest.fixture(params=list(STORAGES))
def storage(request: pytest.FixtureRequest) -> StorageMaker:
    return STORAGES[request.param]


def scattered(storage: StorageMaker) -> tuple[TilePool, int, int]:
    """Return a pool and two pages whose tiles are not in one piece."""
    pool = TilePool(SPEC, 4, storage)
    held = pool.alloc_tiles(6)
    pool.free_tiles(held[[0, 2, 5]])
    return pool, pool.alloc_page(), pool.alloc_page()


def test_layers_are_written_read_and_copied(storage: StorageMaker) -> None:
    pool, one, other = scattered(storage)
    rng = np.random.default_rng(1)
    shape = (SPEC.num_kv_heads, SPEC.tile_bytes)
    written = [rng.integers(0, 256, shape).astype(np.uint8) for _ in range(SPEC.num_layers)]
    for layer, tiles in enumerate(written):
        pool.install(one, layer, tiles.tobytes())
    pool.copy_page(one, other)
    for layer, tiles in enumerate(written):
        assert np.array_equal(pool.read_tiles(one, layer), tiles)
        assert pool.read(other, layer) == tiles.tobytes()


def test_a_page_handed_out_again_is_zero(storage: StorageMaker) -> None:
    pool, one, _ = scattered(storage)
    full = np.full((SPEC.num_kv_heads, SPEC.tile_bytes), 9, np.uint8)
    for layer in range(SPEC.num_layers):
        pool.write_tiles(one, layer, full)
    pool.free_page(one)
    again = pool.alloc_page()
    assert not any(pool.read_tiles(again, layer).any() for layer in range(SPEC.num_layers))
    assert not bool(pool.buffer.any())


def test_the_devices_table_follows_the_pools() -> None:
    pool, one, other = scattered(STORAGES["device"])
    table = pool.layer_kv(1).device_table
    assert table is not None
    for slot in (one, other):
        assert np.array_equal(table[slot].numpy(), pool.tile_table[slot])
    assert TilePool(SPEC, 1).layer_kv(0).device_table is None


def test_a_device_without_room_is_a_setting_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes: the device lacks"):
        DeviceTiles([TileRange(4096, 1000, 0, 4096)], (1000, 1, 1), HERE)
