"""Pages for prompts that nobody computes: long contexts without their prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvkeep.cache.tiers import Install
from kvkeep.models.shapes import LIKE
from kvkeep.quant.codec import Codec, KVShape, Place
from kvkeep.sealing import SealContext
from kvkeep.types import PAGE_TOKENS, Layout, PageKind


def kv_shape(like: str) -> KVShape:
    """Return what a model of known shapes keeps of a token, in bfloat16."""
    fields = LIKE[like]
    dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    heads, layers = fields["num_key_value_heads"], fields["num_hidden_layers"]
    return KVShape(layers, heads, dim, Layout.BF16)


class MadeUpPages:
    """A tier that holds every page: normal numbers, the same few tiles over and over."""

    def __init__(self, codec: Codec, shape: KVShape) -> None:
        draw = torch.Generator().manual_seed(0)
        size = (shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
        k, v = (torch.randn(size, generator=draw).bfloat16() for _ in range(2))
        self._first, self._other = (
            codec.encode(k, v, Place(0, first)).tobytes() for first in (True, False)
        )

    def holds(self, context: SealContext) -> bool:
        """Return True."""
        return True

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        """Install all layers at once."""
        for layer in range(len(layer_bytes)):
            install(layer, self._first if context.kind is PageKind.FIRST else self._other)
        done(True)

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Callable[[int], bytes],
        expires_s: float | None,
    ) -> None:
        """Let it go."""

    def forget(self, owner: str) -> int:
        """Nothing is kept."""
        return 0

    def poll(self) -> None:
        """Nothing is ever due."""
