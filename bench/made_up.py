"""Pages for prompts that nobody computes: long contexts without their prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvkeep.cache.tiers import Install, Read
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
    """A tier that holds every page: normal numbers, the same few tiles over and over.

    After `only` it holds the first so many pages that it is asked for.
    """

    def __init__(self, codec: Codec, shape: KVShape) -> None:
        draw = torch.Generator().manual_seed(0)
        size = (shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
        k, v = (torch.randn(size, generator=draw).bfloat16() for _ in range(2))
        self._first, self._other = (
            codec.encode(k, v, Place(0, first)).tobytes() for first in (True, False)
        )
        self._most: int | None = None
        self._held: set[SealContext] = set()

    def only(self, pages: int | None) -> None:
        """Hold so many pages from now on, all where it is None."""
        self._most = pages
        self._held.clear()

    def holds(self, context: SealContext) -> bool:
        """Return True for as many pages as there shall be."""
        if self._most is None or context in self._held:
            return True
        if len(self._held) >= self._most:
            return False
        self._held.add(context)
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
        read: Read,
        expires_s: float | None,
    ) -> None:
        """Let it go."""

    def forget(self, owner: str) -> int:
        """Nothing is kept."""
        return 0

    def poll(self) -> None:
        """Nothing is ever due."""
