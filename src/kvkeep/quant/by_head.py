"""Codes whose bits differ by layer and KV head."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvkeep.errors import ConfigError, NonFiniteKV
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.layout import WeightFold
from kvkeep.quant.codec import KVShape, Place, Rotation, Tiles
from kvkeep.quant.hack import Hack
from kvkeep.types import WINDOW_STEP, Layout, PageSpec, TileForm

Layouts = Sequence[Sequence[Layout]]
"""[L][Hkv]"""


class ByHead:
    """Pages as codes, each KV head of each layer in a layout of its own."""

    def __init__(self, layouts: Layouts, window_tokens: int = WINDOW_STEP) -> None:
        self.layouts = tuple(tuple(layer) for layer in layouts)
        names = "/".join(",".join(one.name for one in layer) for layer in self.layouts)
        digest = hashlib.blake2b(names.encode(), digest_size=12, person=b"kvkeep-by-head")
        window = "" if window_tokens == WINDOW_STEP else f"-w{window_tokens}"
        self.name = f"by-head-{digest.hexdigest()}{window}"
        used = {one for layer in self.layouts for one in layer}
        self._codecs = {one: Hack(one, window_tokens) for one in sorted(used)}

    def page_spec(self, shape: KVShape) -> PageSpec:
        """Return the spec; raises `ConfigError` where the model has other layers or heads."""
        if [len(layer) for layer in self.layouts] != [shape.num_kv_heads] * shape.num_layers:
            raise ConfigError(
                f"kv: bits are given for {len(self.layouts)} layers and the model has"
                f" {shape.num_layers} of {shape.num_kv_heads} KV heads; calibrate it again"
            )
        forms = tuple(
            tuple(TileForm(one, tile_bytes(one, shape.head_dim)) for one in layer)
            for layer in self.layouts
        )
        spec = next(iter(self._codecs.values())).page_spec(shape)
        return PageSpec(
            layout=Layout.BY_HEAD,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            tile_bytes=max(form.tile_bytes for layer in forms for form in layer),
            window_tokens=spec.window_tokens,
            first_extra_bytes=spec.first_extra_bytes,
            forms=forms,
        )

    def folds(self, shape: KVShape) -> tuple[WeightFold, ...]:
        """No weight changes."""
        return ()

    def rotation(self, shape: KVShape) -> Rotation | None:
        """Return the rotation that all layouts have."""
        return next(iter(self._codecs.values())).rotation(shape)

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Return [N, bytes of the largest tile] for k, v [N, S, D]; zeros follow shorter tiles."""
        parts = [
            (heads, self._encode(codec, k, v, heads, place))
            for codec, heads in self._in_layer(place.layer)
        ]
        tiles = np.zeros((len(k), max(part.shape[1] for _, part in parts)), np.uint8)
        for heads, part in parts:
            tiles[heads, : part.shape[1]] = part
        return tiles

    def decode(
        self, tiles: Tiles, shape: KVShape, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 k, v [N, S, D]."""
        parts = [
            (heads, codec.decode(tiles[heads], shape, place))
            for codec, heads in self._in_layer(place.layer)
        ]
        order = torch.tensor([head for heads, _ in parts for head in heads]).argsort()
        k, v = (torch.cat([part[i] for _, part in parts])[order] for i in (0, 1))
        return k, v

    def _in_layer(self, layer: int) -> Iterator[tuple[Hack, list[int]]]:
        """Yield the codecs of a layer, each with the heads that it stores."""
        layouts = self.layouts[layer]
        for layout, codec in self._codecs.items():
            heads = [head for head, one in enumerate(layouts) if one == layout]
            if heads:
                yield codec, heads

    def _encode(
        self, codec: Hack, k: torch.Tensor, v: torch.Tensor, heads: list[int], place: Place
    ) -> Tiles:
        try:
            return codec.encode(k[heads], v[heads], place)
        except NonFiniteKV as error:
            raise NonFiniteKV(error.what, heads[error.head]) from None
