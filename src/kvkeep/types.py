"""The nouns that cross package boundaries: numpy only, no torch.

Shape letters are those of `ops/layout.py`: `L` layers, `Hkv` KV heads, `D` head_dim, `P` pages, `S`
= 64 tokens per page, `T` tokens (rows) of a step.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvkeep.errors import ConfigError
from kvkeep.watch import EvictState, Packed

PAGE_TOKENS = 64
"""S: tokens per page and per tile, everywhere."""

PUBLIC_SCOPE = "public"
"""The scope of pages every tenant may read."""

WINDOW_STEP = 128
"""Windows are multiples of it: kernels change layout nowhere else."""

ALL_LIVE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""A tile's live mask when nothing was evicted."""

Kernel = Literal["auto", "avx512", "avx2", "portable", "reference", "triton"]
"""A path of kernels by name; 'auto': the fastest that the machine runs."""

Int32Array = NDArray[np.int32]
UInt64Array = NDArray[np.uint64]
FloatArray = NDArray[np.float32]


class Layout(IntEnum):
    """How one tile's bytes are arranged; every run of tiles carries one (see `ops/layout.py`)."""

    F32 = 0
    BF16 = 1
    ROWS_F32 = 2
    ROWS_F16 = 3
    ROWS_BF16 = 4
    K2V2 = 5
    K4V2 = 6
    K4V4 = 7
    K8V8 = 8
    BY_HEAD = 9
    """Of a run alone: in each layer and KV head the codes that `LayerKV.coded` names."""


class PageState(IntEnum):
    """A page's life: rows are being appended; all rows there; stored in its codec's final form."""

    OPEN = 0
    CLOSED = 1
    ENCODED = 2


class PageKind(IntEnum):
    """What a page's memory is for; pages of different kinds differ in size."""

    PLAIN = 0
    """As its codec stores it, or in the model's dtype where none does."""
    FIRST = 1
    """The same at a sequence's start, where a codec keeps more."""
    STAGED = 2
    """In the model's dtype, beside a coded page until its block ends."""
    KEPT = 3
    """In the model's dtype for good, where other views' pages are coded."""


@dataclass(frozen=True, slots=True)
class PageTag:
    """What decides a page's bytes and readers beside its tokens; in every chain hash."""

    scope: str
    codec: str = "float"
    shield: str = "none"
    adapter: str = ""

    def digest(self) -> bytes:
        """Return 16 bytes that differ for any two different tags (fields are length-framed)."""
        h = hashlib.blake2b(digest_size=16, person=b"kvkeep-tag")
        for part in (self.scope, self.codec, self.shield, self.adapter):
            raw = part.encode()
            h.update(len(raw).to_bytes(4, "little") + raw)
        return h.digest()


def chain_hash(parent: bytes, tag: bytes, tokens: bytes) -> bytes:
    """Return h_i = H(h_{i-1}, tag_i, tokens_i), 32 bytes; token ids are little-endian int32."""
    h = hashlib.blake2b(digest_size=32, person=b"kvkeep-chain")
    h.update(parent)
    h.update(tag)
    h.update(tokens)
    return h.digest()


class TileForm(NamedTuple):
    """How one tile is stored."""

    layout: Layout
    tile_bytes: int


@dataclass(frozen=True, slots=True)
class PageSpec:
    """The shape of a codec's pages for one model; sizes in bytes."""

    layout: Layout
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tile_bytes: int
    """Of the largest tile."""
    window_tokens: int | None = None
    """B, a multiple of 128: a query sees the block of B tokens it lies in as it was computed, and
    all before it as it is stored; None: pages are stored as they were computed.
    """
    first_extra_bytes: int = 0
    """Bytes by which the tiles of a sequence's first page are larger."""
    forms: tuple[tuple[TileForm, ...], ...] = ()
    """[L][Hkv] where `layout` is `BY_HEAD`; (): all tiles are alike."""

    def __post_init__(self) -> None:
        window = self.window_tokens
        if window is not None and (window <= 0 or window % WINDOW_STEP):
            raise ConfigError(
                f"window_tokens is {window}; it must be a positive multiple of {WINDOW_STEP}"
            )

    @property
    def usual_layout(self) -> Layout:
        """Return the layout of most tiles, what a cost model is measured on."""
        if not self.forms:
            return self.layout
        found = Counter(form.layout for layer in self.forms for form in layer)
        return max(found, key=lambda one: (found[one], one))

    @property
    def first_tile_bytes(self) -> int:
        """Return the bytes of a tile of a sequence's first page."""
        return self.tile_bytes + self.first_extra_bytes

    @property
    def first_page_bytes(self) -> int:
        """Return the bytes of a sequence's first page over all layers and KV heads."""
        return self.page_bytes + self.tiles_per_page * self.first_extra_bytes

    @property
    def block_pages(self) -> int:
        """Return the pages that are found again together or not at all."""
        return 1 if self.window_tokens is None else self.window_tokens // PAGE_TOKENS

    @property
    def last_state(self) -> PageState:
        """Return the state of a page whose rows are all there."""
        return PageState.CLOSED if self.window_tokens is None else PageState.ENCODED

    def tile_sizes(self) -> Int32Array:
        """Return [L, Hkv] the bytes of each tile."""
        if not self.forms:
            return np.full((self.num_layers, self.num_kv_heads), self.tile_bytes, np.int32)
        return np.array([[form.tile_bytes for form in layer] for layer in self.forms], np.int32)

    def coded_layouts(self, layer: int) -> Int32Array | None:
        """Return [Hkv] what `BY_HEAD` stands for in a layer; None where all tiles are alike."""
        if not self.forms:
            return None
        return np.array([form.layout for form in self.forms[layer]], np.int32)

    def layout_at(self, layer: int, head: int) -> Layout:
        """Return the layout of a layer's and head's tiles."""
        return self.forms[layer][head].layout if self.forms else self.layout

    def alike(self) -> list[NDArray[np.bool_]]:
        """Return [L, Hkv] each: where tiles are of one size."""
        sizes = self.tile_sizes()
        return [sizes == size for size in np.unique(sizes)]

    def pages_of(self, tiles: NDArray[np.bool_]) -> int:
        """Return the pages that as many tiles as in [n, L, Hkv] are part of at least."""
        return max(-(-int((tiles & own).sum()) // int(own.sum())) for own in self.alike())

    @property
    def tiles_per_page(self) -> int:
        """Return L * Hkv."""
        return self.num_layers * self.num_kv_heads

    @property
    def page_bytes(self) -> int:
        """Return the bytes of one page over all layers and KV heads."""
        return int(self.tile_sizes().sum())

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token over all layers and KV heads."""
        return self.page_bytes // PAGE_TOKENS


@dataclass(slots=True)
class View:
    """What one request attends to: page slots in order, the last of them possibly open."""

    id: int
    tag: PageTag
    slots: Int32Array = field(default_factory=lambda: np.zeros(8, np.int32))
    """Page slots; only the first `num_pages` entries count (capacity doubles)."""
    num_pages: int = 0
    length: int = 0
    """Tokens whose K and V are stored."""
    tainted_from: int | None = None
    """First position computed with a mask, a shadow or a lossy fallback; nothing from there on is
    indexed.
    """
    evict: EvictState | None = None
    version: int = 0
    """How often pages it holds were replaced or dropped: appending pages leaves it alone."""
    packed: Packed | None = None
    apart: int = 0
    """Leading pages that lie in another worker; their slots are -1."""

    def push(self, slot: int) -> None:
        """Append one page slot."""
        if self.num_pages == len(self.slots):
            self.slots = np.concatenate([self.slots, np.zeros_like(self.slots)])
        self.slots[self.num_pages] = slot
        self.num_pages += 1

    def replace(self, page: int, slot: int) -> None:
        """Put another slot in a page's place."""
        self.slots[page] = slot
        self.version += 1

    def assign(self, slots: Sequence[int]) -> None:
        """Hold these page slots and no others."""
        if len(slots) > len(self.slots):
            self.slots = np.zeros(2 * len(slots), np.int32)
        self.slots[: len(slots)] = slots
        self.num_pages = len(slots)
        self.version += 1

    def pack(self, packed: Packed) -> None:
        """Attend to what is left of leading pages instead of these."""
        self.packed = packed
        self.version += 1

    def pages(self) -> Int32Array:
        """Return the page slots in order, a view of `slots`."""
        return self.slots[: self.num_pages]

    def taint(self, position: int) -> None:
        """Mark everything from `position` on as not indexable."""
        if self.tainted_from is None or position < self.tainted_from:
            self.tainted_from = position


@dataclass(frozen=True, slots=True)
class Segment:
    """One request's share of a step: `num_rows` consecutive query rows from `first_position`."""

    view: View
    first_row: int
    num_rows: int
    first_position: int
    staged: Int32Array
    """Slots of pages in the model's dtype, from page `staged_from` on; a codec's pages stay here
    until encoded.
    """
    staged_from: int = 0
    coded: bool = True
    """Whether its pages are ever coded, where any view's are."""


@dataclass(frozen=True, slots=True)
class BatchGeometry:
    """A step's shape, the same for all layers: what a planner may look at."""

    segments: tuple[Segment, ...]
    num_rows: int
    layout: Layout
    """Layout of pages in the model's dtype."""
    coded_layout: Layout
    """Layout of encoded pages."""
    window_tokens: int | None = None
    """As in `PageSpec`; None: nothing is ever encoded."""

    def window_of(self, segment: Segment) -> int | None:
        """Return a segment's window; None: it sees everything as it was computed."""
        return self.window_tokens if segment.coded else None

    def coded_pages(self, segment: Segment, position: int) -> int:
        """Return how many leading pages a query at `position` sees encoded."""
        window = self.window_of(segment)
        return 0 if window is None else position // window * (window // PAGE_TOKENS)


class Chain(Sequence[bytes]):
    """The page hashes of a prompt under the public tag, first page first, and its tokens.

    It may be computed lazily and is valid during the call it is passed to.
    """

    @abstractmethod
    def token_ids(self) -> Int32Array:
        """Return the tokens of all its pages."""


@dataclass(frozen=True, slots=True)
class EpochDelta:
    """What an epoch's end changes, as chain hashes of pages."""

    epoch: int
    promoted: tuple[bytes, ...] = ()
    """The pages that are public from now on, parents before children, the first to get a place
    first; those that are public already may be named again.
    """
    withdrawn: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Access:
    """One prompt of one tenant, as opened."""

    tenant: str
    at: int
    """The tenant's own logical time: views it has opened before."""
    prompt_tokens: int
    own_tokens: int
    public_chain: tuple[bytes, ...]
    """The public pages it was served."""
    branch: bytes = b""
    """Stands for the prompt's next page after `node`; equal for equal continuations."""
    answer_tokens: int | None = None
    """The longest answer it asked for, where known."""
    node: bytes = b""
    """The last page of the prompt that others made public, served from there or from its own."""


class SharingPolicy(Protocol):
    """Decides which chains are public, and when; everything else stays in its scope.

    It stands here because `cache` is handed one and imports no technique.
    """

    at_once: bool
    """Whether pages become public as they are computed; a safe policy waits for an epoch's end."""
    by_scope: bool
    """Whether pages public at once are so within one scope only."""

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return how many leading pages of a chain this tenant may read as public ones."""

    def offer(self, chain: Chain, tenant: str) -> None:
        """Hear that a tenant has sent a prompt and all its full pages are computed or reused."""

    def observe(self, access: Access) -> None:
        """Hear of one prompt and what it hit."""

    def end_epoch(self, now: float) -> EpochDelta:
        """Close an epoch at `now` (seconds) and return what changes.

        Parents come before children.
        """

    def forget(self, tenant: str) -> int:
        """Drop everything remembered of a tenant; return how many of its votes."""
