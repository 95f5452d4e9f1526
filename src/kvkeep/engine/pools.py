"""An engine's pool: the memory asked for, divided, its tiles sealed where that is asked for."""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from kvkeep.cache.pool import TilePool
from kvkeep.cache.radix import TOKEN_KEYS, PageKeys
from kvkeep.cache.sealed import SealedTiles
from kvkeep.cache.storage import StorageMaker
from kvkeep.engine.backend import Backend
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sizing import divide, kept_part, most_pages
from kvkeep.errors import ConfigError
from kvkeep.models.memory import free_on
from kvkeep.ops.layout import LANE_LAYOUTS, float_tile_bytes
from kvkeep.quant.codec import KVShape
from kvkeep.shield.secret import lock, overwrite_freed
from kvkeep.shield.tiles import PageLabels, TileCipher, TileKeys
from kvkeep.types import PAGE_TOKENS, PageSpec

DEFAULT_KV_BYTES: Final = 4 << 30


class Secrecy:
    """How tiles and the index hide what they hold: not at all, or under keys of this start."""

    def __init__(self, options: EngineOptions, backend: Backend, *, alone: bool = True) -> None:
        """`alone`: no other engine names its pages; raises `ConfigError` for what can't be."""
        self.keys: PageKeys = TOKEN_KEYS
        self._cipher: TileCipher | None = None
        if options.shield != "tile":
            return
        if backend.ops.device.type != "cpu" or backend.ops.name == "triton":
            raise ConfigError("shield: tile opens pages on a CPU; use seal with this device")
        if options.guard_share:
            raise ConfigError(
                "guard_share: shadows would lie open in memory; leave it at 0 with shield tile"
            )
        if not alone:
            raise ConfigError(
                "shield: under tile only this process can name its pages; use seal in a cluster"
            )
        keys = TileKeys()
        self.keys, self._cipher = PageLabels(keys), TileCipher(keys)
        overwrite_freed()

    def storage(self, plain: StorageMaker, scratch_bytes: int) -> StorageMaker:
        """Return what makes the pool's storage."""
        if self._cipher is None:
            return plain
        return partial(SealedTiles, cipher=self._cipher, scratch_bytes=scratch_bytes, lock=lock)

    def scratch_bytes(
        self, spec: PageSpec, float_layer_bytes: int, pages: int, options: EngineOptions
    ) -> int:
        """Return what the longest request's pages of one layer take, where they are opened."""
        if self._cipher is None:
            return 0
        first = spec.num_kv_heads * spec.first_extra_bytes
        layer = int(np.max(spec.tile_sizes().sum(1))) + first
        return pages * max(layer, float_layer_bytes if kept_part(options) else 0)


def pool_of(
    options: EngineOptions,
    backend: Backend,
    spec: PageSpec,
    shape: KVShape,
    max_model_len: int,
    secrecy: Secrecy,
) -> TilePool:
    """Return the pool of the memory asked for, or of what is free; raises `ConfigError`."""
    if spec.forms and shape.layout not in LANE_LAYOUTS.values():
        raise ConfigError(
            "kv: bits that differ by head are attended on a CPU only; choose one codec there"
        )
    available = free_on(backend.ops.device) or 2 * DEFAULT_KV_BYTES
    wanted = options.kv_cache_bytes or min(DEFAULT_KV_BYTES, available // 2)
    if wanted > available:
        raise ConfigError(
            f"kv_cache_memory_bytes: {wanted / 2**30:.1f} GiB were asked for and"
            f" {available / 2**30:.1f} GiB are free; lower it or free memory"
        )
    tile_bytes = float_tile_bytes(shape.layout, shape.head_dim)
    longest = min(-(-max_model_len // PAGE_TOKENS) + 1, -(-wanted // spec.page_bytes))
    open_bytes = secrecy.scratch_bytes(spec, tile_bytes * shape.num_kv_heads, longest, options)
    most = most_pages(options, max_model_len)
    division = divide(spec, tile_bytes, wanted - open_bytes, options, most)
    storage = secrecy.storage(backend.storage, open_bytes)
    return TilePool(spec, division.num_pages, storage, division.beside)
