"""Pages for prompts that nobody computes: long contexts without their prefill."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvkeep.models.shapes import LIKE
from kvkeep.quant.codec import Codec, KVShape, Place
from kvkeep.types import PAGE_TOKENS, Layout


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
        self._layers = shape.num_layers
        self._starts: set[bytes] = set()
        self._asked = False

    def holds(self, chain_hash: bytes) -> bool:
        """Return True; what is asked for first after a poll starts a sequence."""
        if not self._asked:
            self._starts.add(chain_hash)
        self._asked = True
        return True

    def fetch(
        self,
        chain_hash: bytes,
        install: Callable[[int, bytes], None],
        done: Callable[[bool], None],
    ) -> None:
        """Install all layers at once."""
        for layer in range(self._layers):
            install(layer, self._first if chain_hash in self._starts else self._other)
        done(True)

    def store(self, chain_hash: bytes, read: Callable[[int], bytes]) -> None:
        """Let it go."""

    def poll(self) -> None:
        """Nothing is ever due."""
        self._asked = False
