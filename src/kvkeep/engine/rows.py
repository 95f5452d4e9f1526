"""A view's recent rows: read as they were computed, written as another engine computed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from kvkeep.cache.pool import TilePool
from kvkeep.cache.tiers import OpenRows
from kvkeep.ops.layout import TORCH_DTYPE, AttentionOps
from kvkeep.quant.codec import Codec, KVShape, Place, values_of
from kvkeep.types import PAGE_TOKENS, Int32Array, View

RowsState = Literal["awaited", "there", "lost"]


class RowsToCome(Protocol):
    """Rows of one prompt behind its last whole pages or blocks, computed by another engine."""

    @property
    def state(self) -> RowsState:
        """Return where they stand; what is lost stays lost."""

    @property
    def first(self) -> int:
        """Return the position of the first."""

    @property
    def end(self) -> int:
        """Return the position behind the last: the prompt's length."""

    def take(self) -> Sequence[bytes | memoryview]:
        """Return each layer's [2, T, Hkv, D], K and V in the model's dtype; once."""


class NewRows(NamedTuple):
    """K and V [T, Hkv, D] of rows as they are stored."""

    k: torch.Tensor
    v: torch.Tensor

    def page(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k, v [Hkv, S, D] of a page whose first token is row `at`."""
        own = slice(at, at + PAGE_TOKENS)
        return self.k[own].transpose(0, 1).contiguous(), self.v[own].transpose(0, 1).contiguous()

    def told(self, at: int, count: int) -> bytes:
        """Return `count` rows from `at` on as [2, count, Hkv, D]."""
        own = slice(at, at + count)
        return _bytes_of(torch.stack((self.k[own], self.v[own])))


class RowStore:
    """Rows in pages in the model's dtype, and the codec that makes pages of them."""

    def __init__(self, pool: TilePool, ops: AttentionOps, codec: Codec, shape: KVShape) -> None:
        self._pool = pool
        self._ops = ops
        self._codec = codec
        self._shape = shape

    def encode(self, source: int, target: int, place: Place) -> None:
        """Write the codec's tiles of one page and layer; raises `NonFiniteKV`."""
        k, v = values_of(self._pool.tiles_there((source,), place.layer), self._shape)
        self._pool.write_tiles(target, place.layer, self._codec.encode(k, v, place))

    def stores(self, new: NewRows) -> bool:
        """Tell whether rows are stored bit for bit, so that nothing need be read back."""
        return new.k.dtype == new.v.dtype == TORCH_DTYPE[self._shape.layout]

    def encode_new(self, new: NewRows, at: int, target: int, place: Place) -> None:
        """Do as `encode` for a page of rows that are stored as they are; raises `NonFiniteKV`."""
        self._pool.write_tiles(target, place.layer, self._codec.encode(*new.page(at), place))

    def read(self, rows: OpenRows, layer: int) -> bytes:
        """Return rows of one layer as [2, T, Hkv, D]."""
        tiles = self._pool.tiles_there(rows.slots, layer)
        pages, heads = len(rows.slots), self._shape.num_kv_heads
        both = torch.stack(values_of(tiles, self._shape)).view(2, pages, heads, PAGE_TOKENS, -1)
        by_token = both.transpose(2, 3).reshape(2, pages * PAGE_TOKENS, heads, -1)
        return _bytes_of(by_token[:, : rows.num_rows].contiguous())

    def write(self, view: View, layers: Sequence[bytes | memoryview], slots: Int32Array) -> None:
        """Write each layer's rows from `view.length` on at `slots` [T] = page slot * S + row.

        Pages that are whole by it are encoded where they are not the view's own. Raises
        `NonFiniteKV`.
        """
        begin, end = view.length, view.length + len(slots)
        dtype, device = TORCH_DTYPE[self._shape.layout], self._pool.buffer.device
        closed = range(begin // PAGE_TOKENS, end // PAGE_TOKENS)
        for layer, data in enumerate(layers):
            rows = torch.frombuffer(bytearray(data), dtype=dtype).to(device)
            new = NewRows(*rows.view(2, len(slots), self._shape.num_kv_heads, -1))
            self._ops.append(self._pool.layer_kv(layer), new.k, new.v, slots)
            for page in closed:
                at, target = page * PAGE_TOKENS - begin, int(view.slots[page])
                if slots[at] // PAGE_TOKENS != target:
                    self.encode_new(new, at, target, Place(layer, page == 0))


def slots_of(pages: Int32Array, first_page: int, begin: int, end: int) -> Int32Array:
    """Return where rows [begin, end) lie in pages from `first_page` on: page slot * S + row."""
    positions = np.arange(begin, end)
    found = pages[positions // PAGE_TOKENS - first_page] * PAGE_TOKENS + positions % PAGE_TOKENS
    return found.astype(np.int32)


def _bytes_of(values: torch.Tensor) -> bytes:
    return values.cpu().view(torch.uint8).numpy().tobytes()
