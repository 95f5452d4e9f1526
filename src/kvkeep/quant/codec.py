"""The codec seam: the form in which pages are stored, seen once their block has ended."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.ops.cpu_encode import rows_of_tiles
from kvkeep.ops.layout import HOST, LANE_LAYOUTS, TORCH_DTYPE, WeightFold, float_tile_bytes
from kvkeep.types import PAGE_TOKENS, Layout, PageSpec

Tiles = NDArray[np.uint8]


class KVShape(NamedTuple):
    """What a codec needs to know of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    layout: Layout
    """Layout of the model's dtype."""


class Rotation(NamedTuple):
    """Matrices [D, D] that queries and keys are multiplied by; the product q k^T is the unit."""

    q: torch.Tensor
    k: torch.Tensor


class Place(NamedTuple):
    """Where a page's tiles belong."""

    layer: int
    first: bool
    """Of a sequence's first page."""


class Codec(Protocol):
    """Stores pages; attention reads the stored form, `decode` is for tests and tools."""

    name: str

    def page_spec(self, shape: KVShape) -> PageSpec:
        """Return the stored page's shape and size."""

    def folds(self, shape: KVShape) -> tuple[WeightFold, ...]:
        """Return weight changes this codec wants at load."""

    def rotation(self, shape: KVShape) -> Rotation | None:
        """Return how queries and keys are turned after RoPE; None: not at all."""

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Return [N, tile bytes] for k, v [N, S, D], the KV heads of a layer.

        Computes where k and v are; what it returns is in this machine's memory.
        Raises `NonFiniteKV` where a codec can't store a value.
        """

    def decode(
        self, tiles: Tiles, shape: KVShape, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k, v [N, S, D] that stored tiles stand for."""


class Float:
    """Pages stay in the model's dtype: the baseline."""

    name = "float"

    def page_spec(self, shape: KVShape) -> PageSpec:
        """Return the float layout's spec; nothing is ever encoded."""
        return PageSpec(
            layout=shape.layout,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            tile_bytes=float_tile_bytes(shape.layout, shape.head_dim),
        )

    def folds(self, shape: KVShape) -> tuple[WeightFold, ...]:
        """No weight changes."""
        return ()

    def rotation(self, shape: KVShape) -> Rotation | None:
        """No rotation."""
        return None

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Return tiles in a CPU's layout of k's dtype."""
        return pack_float_tiles(k, v, LANE_LAYOUTS[k.dtype])

    def decode(
        self, tiles: Tiles, shape: KVShape, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stored values."""
        return unpack_float_tiles(tiles, shape)


def pack_float_tiles(k: torch.Tensor, v: torch.Tensor, layout: Layout) -> Tiles:
    """Arrange k, v [N, S, D] as float tiles of a layout of their dtype (`ops/layout.py`)."""
    n, _, d = k.shape
    keys, values = k, v
    if layout == Layout.BF16:
        keys = k.reshape(n, PAGE_TOKENS // 16, 16, d // 2, 2).permute(0, 1, 3, 2, 4)
        values = v.reshape(n, PAGE_TOKENS // 2, 2, d).permute(0, 1, 3, 2)
    elif layout == Layout.F32:
        keys = k.reshape(n, PAGE_TOKENS // 16, 16, d).permute(0, 1, 3, 2)
    parts = [x.contiguous().reshape(n, -1).view(torch.uint8) for x in (keys, values)]
    return np.asarray(torch.cat(parts, 1).numpy())


def unpack_float_tiles(tiles: Tiles, shape: KVShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k, v [N, S, D] of float tiles [N, tile_bytes]."""
    return values_of(torch.from_numpy(np.ascontiguousarray(tiles)), shape)


def values_of(tiles: torch.Tensor, shape: KVShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k, v [N, S, D] of float tiles [N, tile_bytes] uint8, where these are."""
    if tiles.device == HOST and shape.layout in LANE_LAYOUTS.values():
        return rows_of_tiles(tiles, shape.layout, shape.head_dim)
    return values_plainly(tiles, shape)


def values_plainly(tiles: torch.Tensor, shape: KVShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `values_of` does, by torch: the kernel's oracle."""
    n, d = len(tiles), shape.head_dim
    values = tiles.view(TORCH_DTYPE[shape.layout])
    k, v = values[:, : PAGE_TOKENS * d], values[:, PAGE_TOKENS * d :]
    if shape.layout == Layout.BF16:
        k = k.reshape(n, PAGE_TOKENS // 16, d // 2, 16, 2).permute(0, 1, 3, 2, 4)
        v = v.reshape(n, PAGE_TOKENS // 2, d, 2).permute(0, 1, 3, 2)
    elif shape.layout == Layout.F32:
        k = k.reshape(n, PAGE_TOKENS // 16, d, 16).permute(0, 1, 3, 2)
    return k.reshape(n, PAGE_TOKENS, d), v.reshape(n, PAGE_TOKENS, d)
