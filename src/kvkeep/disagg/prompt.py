"""A prompt's pages as two workers name them: from its own tokens, never from what came."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

from kvkeep.cache.below import Below, layer_bytes
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.radix import KEY_BYTES, token_bytes
from kvkeep.disagg.wire import Block, Hello
from kvkeep.engine.api import GenerateRequest, ModelInfo
from kvkeep.engine.speeds import Speeds
from kvkeep.errors import ConfigError
from kvkeep.sealing import PageSealer, SealContext, layers_of
from kvkeep.types import PAGE_TOKENS, PageKind, PageTag, chain_hash

_PLACE = struct.Struct("<HHII")
_ROWS = struct.Struct("<HHIII")
_OPEN = struct.Struct("<HHI")
_DIGEST_BYTES = 16


class PromptPages:
    """What the pages of one prompt are called and bound to on a link.

    The chain is that of the scope's own pages from the first on: which of them either worker
    holds as public ones is nothing to the other.
    """

    def __init__(
        self,
        manager: CacheManager,
        spec: GenerateRequest,
        tag: PageTag,
        sealer: PageSealer,
        *,
        row_bytes: int = 0,
    ) -> None:
        """`sealer` is the transfer's; `row_bytes` those of a layer's K and V of one token."""
        self._sealer = sealer
        self._below = below_of(manager)
        self._account, self.tag, self.digest = spec.tenant, tag, tag.digest()
        self._first = manager.pool.num_first > 0
        self._sizes = {kind: layer_bytes(manager.pool, kind) for kind in PageKind}
        self.num_layers = manager.pool.spec.num_layers
        raw = token_bytes(spec.prompt_ids)
        self.hashes: list[bytes] = []
        last = manager.index.model_digest
        for begin in range(0, len(raw) - KEY_BYTES + 1, KEY_BYTES):
            last = chain_hash(last, self.digest, raw[begin : begin + KEY_BYTES])
            self.hashes.append(last)
        self._root = manager.index.model_digest
        self.open_page = manager.findable_pages(len(spec.prompt_ids))
        """Behind the last page that a cache finds: from there on rows come beside the pages."""
        self.open_tokens = len(spec.prompt_ids) - self.open_page * PAGE_TOKENS
        self._open_raw = raw[self.open_page * KEY_BYTES :]
        self._open_size = row_bytes * self.open_tokens

    def chain(self, page: int) -> bytes:
        """Return the hash of the chain up to a page."""
        return self.hashes[page - 1] if page else self._root

    def size(self, page: int, layer: int) -> int:
        """Return the bytes of a layer of a page."""
        return self._sizes[self._kind(page)][layer]

    def sizes(self, block: Block) -> tuple[int, ...]:
        """Return the bytes of each layer of each page of a block, in its order."""
        return tuple(
            self.size(page, layer)
            for layer in range(block.layer, block.layer + block.layers)
            for page in range(block.first_page, block.first_page + block.pages)
        )

    def context(self, block: Block) -> SealContext:
        """Return what a block is bound to: its last page's chain, and its place."""
        last = block.first_page + block.pages - 1
        kind = self._kind(block.first_page)
        page = self._below.context(self._account, self.tag, self.hashes[last], kind)
        place = hashlib.blake2b(page.spec_digest, digest_size=_DIGEST_BYTES, person=b"kvkeep-wire")
        place.update(_PLACE.pack(block.layer, block.layers, block.first_page, block.pages))
        return SealContext(
            page.owner, page.tag, page.chain_hash, page.model_digest, place.digest(), kind
        )

    def seal(self, block: Block, data: bytes) -> memoryview:
        """Return a block's layers, one after another, as a frame; raises `SealError`."""
        return self._sealer.seal(self.context(block), data, self.sizes(block))

    def open(self, block: Block, frame: memoryview) -> list[memoryview]:
        """Return a block's layers; raises `SealError` where the frame is none of this block."""
        sizes = self.sizes(block)
        return layers_of(self._sealer.open(self.context(block), frame, sizes), sizes)

    # Rows behind its last whole pages

    def open_pays(self, length: int, speeds: Speeds) -> bool:
        """Tell whether those of a prompt of this length are worth sending behind its pages."""
        pages = sum(sum(self._sizes[self._kind(page)]) for page in range(self.open_page))
        return speeds.rows_pay(length, self.open_tokens, pages, self.open_bytes)

    @property
    def open_bytes(self) -> int:
        """Return the bytes of all layers of the rows behind its last whole pages."""
        return self._open_size * self.num_layers

    def open_block(self, request: int, layer: int, layers: int) -> Block:
        """Return what so many layers of those rows are called."""
        pages = -(-self.open_tokens // PAGE_TOKENS)
        return Block(request, layer, layers, self.open_page, pages, self.digest)

    def seal_open(self, block: Block, data: bytes) -> memoryview:
        """Return layers of those rows, one after another, as a frame; raises `SealError`."""
        sizes = (self._open_size,) * block.layers
        return self._sealer.seal(self._open_context(block), data, sizes)

    def open_open(self, block: Block, frame: memoryview) -> list[memoryview]:
        """Return each layer's rows; raises `SealError` where the frame is none of these."""
        sizes = (self._open_size,) * block.layers
        return layers_of(self._sealer.open(self._open_context(block), frame, sizes), sizes)

    def _open_context(self, block: Block) -> SealContext:
        """Return what they are bound to: the chain before them, their tokens, and their layers."""
        kind = self._kind(self.open_page)
        chain = self.chain(self.open_page)
        page = self._below.context(self._account, self.tag, chain, kind)
        place = hashlib.blake2b(page.spec_digest, digest_size=_DIGEST_BYTES, person=b"kvkeep-open")
        place.update(_OPEN.pack(block.layer, block.layers, block.first_page) + self._open_raw)
        return SealContext(
            page.owner, page.tag, page.chain_hash, page.model_digest, place.digest(), kind
        )

    # Rows that attend to its first pages where they lie

    def seal_rows(self, block: Block, pages: int, data: memoryview, *, answer: bool) -> memoryview:
        """Return rows' queries, or with `answer` their states, as a frame; raises `SealError`."""
        return self._sealer.seal(self._rows_context(block, pages, answer), data, (len(data),))

    def open_rows(
        self, block: Block, pages: int, frame: memoryview, size: int, *, answer: bool
    ) -> bytearray:
        """Return `size` bytes of rows; raises `SealError` for a frame that is none of these."""
        opened = layers_of(
            self._sealer.open(self._rows_context(block, pages, answer), frame, (size,)), (size,)
        )
        return bytearray(opened[0])

    def _rows_context(self, block: Block, pages: int, answer: bool) -> SealContext:
        """Return what rows are bound to: the pages' chain, layer, turn, count and direction."""
        kind = self._kind(0)
        page = self._below.context(self._account, self.tag, self.hashes[pages - 1], kind)
        place = hashlib.blake2b(page.spec_digest, digest_size=_DIGEST_BYTES, person=b"kvkeep-rows")
        place.update(_ROWS.pack(block.layer, answer, block.first_page, block.pages, pages))
        return SealContext(
            page.owner, page.tag, page.chain_hash, page.model_digest, place.digest(), kind
        )

    def _kind(self, page: int) -> PageKind:
        return PageKind.FIRST if page == 0 and self._first else PageKind.PLAIN


def hello_of(info: ModelInfo, managers: Mapping[str, CacheManager], window_bytes: int) -> Hello:
    """Return what a worker says of itself."""
    forms = {name: below_of(one).form.hex() for name, one in managers.items()}
    return Hello(info.digest, forms, info.sealer, window_bytes)


def below_of(manager: CacheManager) -> Below:
    """Return what names a manager's pages outside memory."""
    if manager.below is None:
        raise ConfigError("link: this engine was built without a place for pages to go to")
    return manager.below
