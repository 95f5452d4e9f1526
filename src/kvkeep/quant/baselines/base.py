"""What a baseline is, and how it runs in an engine: coded for its bytes, stored as it comes back.

A baseline turns one layer of a page into a buffer and back. `Dequantised` puts what comes back into
pages of the model's dtype, so that attention reads them as ever: it measures quality and bytes, not
speed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from kvkeep.ops.layout import LANE_LAYOUTS, WeightFold
from kvkeep.quant.codec import (
    Codec,
    Float,
    KVShape,
    Place,
    Rotation,
    Tiles,
    pack_float_tiles,
    unpack_float_tiles,
)
from kvkeep.types import WINDOW_STEP, PageSpec

KV = tuple[torch.Tensor, torch.Tensor]
"""k, v [N, S, D] of the N KV heads of a layer."""


class Baseline(ABC):
    """Stores one layer of a page in a buffer of its own."""

    name: str

    @abstractmethod
    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return the buffer of k, v [N, S, D]."""

    @abstractmethod
    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return float32 k, v [N, S, D] that a buffer stands for."""

    def rotation(self, shape: KVShape) -> Rotation | None:
        """Return how queries and keys are turned before; most are not."""
        return None

    def rounded(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> KV:
        """Return what comes back of k, v, by a shorter way where the baseline has one."""
        return self.decode(self.encode(k, v, place), shape_of(k), place)


class Stored(Baseline):
    """A codec of ours as a baseline."""

    def __init__(self, codec: Codec) -> None:
        self.name = codec.name
        self.codec = codec
        """May be replaced by another with the same rotation."""

    def rotation(self, shape: KVShape) -> Rotation | None:
        """Return the codec's rotation."""
        return self.codec.rotation(shape)

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Return the codec's tiles."""
        return self.codec.encode(k, v, place).tobytes()

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return what the tiles stand for."""
        tiles = np.frombuffer(bytearray(blob), np.uint8).reshape(shape.num_kv_heads, -1)
        return self.codec.decode(tiles, shape, place)


class Dequantised:
    """A baseline as an engine's codec: pages hold what comes back, in the model's dtype."""

    def __init__(self, baseline: Baseline, *, every: int = 1) -> None:
        """`every`: of how many pages and layers one is really coded, for its bytes."""
        self.name = f"{baseline.name}-dequantised"
        self.stored_bytes = 0
        """Length of the buffers written so far."""
        self.float_bytes = 0
        """What they would take in the model's dtype."""
        self._baseline = baseline
        self._every = every
        self._pages = 0

    def page_spec(self, shape: KVShape) -> PageSpec:
        """Return the float layout's spec; pages are rewritten when they close."""
        spec = Float().page_spec(shape)
        return PageSpec(
            layout=spec.layout,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            tile_bytes=spec.tile_bytes,
            window_tokens=WINDOW_STEP,
        )

    def folds(self, shape: KVShape) -> tuple[WeightFold, ...]:
        """No weight changes."""
        return ()

    def rotation(self, shape: KVShape) -> Rotation | None:
        """Return the baseline's rotation."""
        return self._baseline.rotation(shape)

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Return float tiles of what comes back of k, v."""
        if self._pages % self._every == 0:
            blob = self._baseline.encode(k, v, place)
            self.stored_bytes += len(blob)
            self.float_bytes += 2 * k.numel() * k.element_size()
            back = self._baseline.decode(blob, shape_of(k), place)
        else:
            back = self._baseline.rounded(k, v, place)
        self._pages += 1
        keys, values = (x.to(k.dtype) for x in back)
        return pack_float_tiles(keys, values, LANE_LAYOUTS[k.dtype])

    def decode(self, tiles: Tiles, shape: KVShape, place: Place) -> KV:
        """Return the stored values."""
        return unpack_float_tiles(tiles, shape)


class Fields:
    """Reads a buffer's arrays in the order they were joined."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self._at = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return the next array."""
        count = int(np.prod(shape)) * dtype.itemsize
        raw = bytearray(self._blob[self._at : self._at + count])
        self._at += count
        return torch.frombuffer(raw, dtype=dtype).view(shape)

    def rest(self) -> bytes:
        """Return what is left."""
        return self._blob[self._at :]


def joined(parts: Sequence[torch.Tensor]) -> bytes:
    """Return the arrays' bytes one after the other."""
    return b"".join(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in parts)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes of uint8 codes, the first in the lowest bits."""
    fields = codes.reshape(-1, 8 // bits)
    packed = fields[:, 0].clone()
    for i in range(1, fields.shape[1]):
        packed |= fields[:, i] << bits * i
    return packed


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of bytes; the inverse of `pack_bits`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed[:, None] >> shifts & ((1 << bits) - 1)).view(-1)


def shape_of(k: torch.Tensor) -> KVShape:
    """Return the shape of one layer's k [N, S, D]."""
    return KVShape(1, k.shape[0], k.shape[2], LANE_LAYOUTS.get(k.dtype, LANE_LAYOUTS[torch.float]))
