"""The memory of all pages: one mapping cut into tiles, and the tile table kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.cache.classes import Beside, PageClass, Part, classes_of, ranges_of, wanted_of
from kvkeep.cache.sealed import SealedTiles
from kvkeep.cache.storage import HostTiles, StorageMaker, Tiles
from kvkeep.errors import ConfigError, EngineError, PoolExhausted
from kvkeep.ops.layout import LayerKV
from kvkeep.types import Int32Array, PageKind, PageSpec


class TilePool:
    """All tiles, and the table [slots, L, Hkv] that says which of them make up a page.

    Pages of each kind have tiles, slots and free lists of their own, their number fixed: none can
    run out because another kind is in demand. Bytes of a page or tile are zero when it is handed
    out: nothing of its last holder can be read, and rows not yet written are finite.
    """

    def __init__(
        self,
        spec: PageSpec,
        num_pages: int,
        storage: StorageMaker = HostTiles,
        beside: Beside | None = None,
    ) -> None:
        if num_pages < 1:
            raise ConfigError(
                f"num_pages is {num_pages}; at least 1 is needed: give the cache more memory"
            )
        self.spec = spec
        self.num_pages = num_pages
        self.num_first = 0 if beside is None else beside.num_first
        wanted = wanted_of(spec, num_pages, beside)
        ranges = ranges_of(wanted)
        slots = sum(one.pages for one in wanted)
        shape = (slots, spec.num_layers, spec.num_kv_heads)
        self._storage = storage(ranges, shape)
        self.sealed = self._storage if isinstance(self._storage, SealedTiles) else None
        """Its tiles, where they are sealed while nobody attends to them."""
        self._classes = classes_of(wanted, ranges)
        places = {one.kind: place for place, one in enumerate(wanted)}
        self._of = {kind: places.get(kind, 0) for kind in PageKind}
        self.buffer: torch.Tensor = self._storage.buffer
        self.tile_table: Int32Array = np.full(shape, -1, np.int32)
        self._holders = np.zeros(slots, np.int32)
        self._layers = tuple(self._layer_kv(layer) for layer in range(spec.num_layers))

    @property
    def free_pages(self) -> int:
        """Return the pages that can still be handed out, staged ones aside."""
        kinds = {self._of[PageKind.PLAIN], self._of[PageKind.FIRST]}
        used = sum(self._classes[at].num_pages - self._classes[at].free_pages for at in kinds)
        return self.num_pages - used

    @property
    def free_tiles_count(self) -> int:
        """Return the tiles of plain pages in no page and in no view."""
        return sum(len(part.tiles) for part in self._class(PageKind.PLAIN).parts)

    def bytes_of(self, kind: PageKind) -> int:
        """Return the memory of all pages of a kind; 0 where they are of another's."""
        at = self._of[kind]
        if kind is not PageKind.PLAIN and at == self._of[PageKind.PLAIN]:
            return 0
        return self._classes[at].num_bytes

    def num_of(self, kind: PageKind) -> int:
        """Return the pages of one kind, free or not."""
        return self._class(kind).num_pages

    def free_of(self, kind: PageKind) -> int:
        """Return the pages of one kind that can still be handed out."""
        return self._class(kind).free_pages

    def alloc_page(self, kind: PageKind = PageKind.PLAIN) -> int:
        """Return the slot of a zeroed page.

        Raises `PoolExhausted` and takes nothing where none of the kind is free.
        """
        own = self._class(kind)
        if not own.free_pages:
            raise PoolExhausted("no free page: 1 asked for, 0 left")
        slot = own.first_slot + int(own.slots.take(1)[0])
        for part in own.parts:
            ids = part.range.ids(part.tiles.take(part.per_page))
            self.tile_table[slot][part.where] = ids
            self._storage.zero(part.place, ids)
        self._storage.place(slot, self.tile_table[slot])
        self._holders[slot] = 1
        return slot

    def hold_page(self, slot: int) -> None:
        """Add a holder to a page in use: it takes one `free_page` more until it is free."""
        self._require(slot)
        self._holders[slot] += 1

    def holders(self, slot: int) -> int:
        """Return how many hold a page."""
        return int(self._holders[slot])

    def free_page(self, slot: int) -> None:
        """Let one holder go of a page; the last frees it and its tiles.

        Raises `EngineError` where the slot is not in use.
        """
        own = self._require(slot)
        self._holders[slot] -= 1
        if self._holders[slot]:
            return
        own.slots.give_back(np.array([slot - own.first_slot], np.int32))
        for part in own.parts:
            ids = self.tile_table[slot][part.where]
            self._drop(part, ids)
            part.tiles.give_back(part.range.numbers(ids))
        self.tile_table[slot] = -1

    def alloc_tiles(
        self, count: int, layer: int = 0, head: int = 0, *, kind: PageKind = PageKind.PLAIN
    ) -> Int32Array:
        """Return ids of zeroed tiles for a view of its own, of the size of a layer and head.

        Raises `PoolExhausted`.
        """
        own = next(p for p in self._class(kind).parts if p.where[layer, head])
        ids = own.range.ids(own.tiles.take(count))
        self._storage.zero(own.place, ids)
        return ids

    def free_tiles(self, ids: Int32Array, kind: PageKind = PageKind.PLAIN) -> None:
        """Free tiles taken with `alloc_tiles`; raises `EngineError` where one is not in use."""
        parts = self._class(kind).parts
        held = [ids[part.range.holds(ids)] for part in parts]
        if sum(map(len, held)) != len(ids):
            raise EngineError("a tile was freed that is not in use")
        for part, own in zip(parts, held, strict=True):
            self._drop(part, own)
            part.tiles.give_back(part.range.numbers(own))

    def seal(self, slot: int) -> None:
        """Seal a page to which no row is appended any more, where pages are sealed."""
        if self.sealed is None:
            return
        for part in self._require(slot).parts:
            self.sealed.seal(part.place, self.tile_table[slot][part.where])

    def open_bytes(self) -> NDArray[np.int64]:
        """Return [slots] the bytes of a page's largest layer; 0 where it is never sealed."""
        found, staged = np.zeros(len(self.tile_table), np.int64), self._of[PageKind.STAGED]
        for place, own in enumerate(self._classes):
            layers = sum(part.where.sum(1) * part.range.tile_bytes for part in own.parts)
            last = own.first_slot + own.num_pages
            found[own.first_slot : last] = 0 if place == staged > 0 else np.max(layers)
        return found

    def prove(self, ids: Int32Array) -> None:
        """Raise `SealError` where one of these tiles, sealed and of any sizes, was changed."""
        if self.sealed is None:
            return
        for part in self._parts():
            self.sealed.prove(part.place, ids[part.range.holds(ids)])

    def read_ids(self, ids: Int32Array) -> Tiles:
        """Return tiles of one size by their ids; perhaps a view."""
        return self._storage.read(self._place_of(ids), ids)

    def write_ids(self, ids: Int32Array, tiles: Tiles) -> None:
        """Write tiles of one size by their ids."""
        self._storage.write(self._place_of(ids), ids, tiles)

    def copy_page(self, source: int, target: int) -> None:
        """Copy all bytes of one page to another of its kind."""
        own = self._require(source)
        if self._require(target) is not own:
            raise EngineError("a page can be copied only to one of its own kind")
        old, new = self.tile_table[source], self.tile_table[target]
        for part in own.parts:
            self._storage.copy(part.place, old[part.where], new[part.where])

    def read(self, slot: int, layer: int) -> bytes:
        """Return one layer of a page, its Hkv tiles in order."""
        parts = list(self._require(slot).in_layer(layer))
        if len(parts) == 1:
            return self._storage.read(parts[0][0].place, self.tile_table[slot, layer]).tobytes()
        tiles, sizes = self.read_tiles(slot, layer), self._sizes(slot, layer)
        return b"".join(tile[:size].tobytes() for tile, size in zip(tiles, sizes, strict=True))

    def read_page(self, slot: int, into: memoryview) -> None:
        """Write all layers of a page one after another, in as few copies as its tiles allow.

        Tiles that follow each other are one copy that keeps the interpreter's lock: giving it up
        would cost a wait for whoever takes it.
        """
        parts = self._require(slot).parts
        if len(parts) == 1:
            tiles = self._storage.read(parts[0].place, self.tile_table[slot].reshape(-1))
            into[:] = tiles.reshape(-1).data
            if self.sealed is not None:
                tiles.fill(0)  # they are a copy in the clear
            return
        at = 0
        for layer in range(self.spec.num_layers):
            data = self.read(slot, layer)
            into[at : at + len(data)] = data
            at += len(data)

    def read_tiles(self, slot: int, layer: int) -> Tiles:
        """Return one layer of a page, [Hkv, bytes of the largest tile]; perhaps a view.

        Zeros follow shorter tiles.
        """
        ids = self.tile_table[slot, layer]
        parts = list(self._require(slot).in_layer(layer))
        if len(parts) == 1:
            return self._storage.read(parts[0][0].place, ids)
        tiles = np.zeros((len(ids), max(part.range.tile_bytes for part, _ in parts)), np.uint8)
        for part, heads in parts:
            own = self._storage.read(part.place, ids[heads])
            tiles[heads, : part.range.tile_bytes] = own
        return tiles

    def tiles_there(self, slots: Sequence[int] | Int32Array, layer: int) -> torch.Tensor:
        """Return a copy of one layer of pages, [n * Hkv, tile bytes] uint8, where the pool is.

        Of pages of one kind whose tiles are of one size, as those in the model's dtype are. Raises
        `EngineError` for others.
        """
        kind, *others = (self._require(int(slot)) for slot in slots)
        if len(kind.parts) > 1 or any(other is not kind for other in others):
            raise EngineError("pages of several kinds, or tiles of several sizes")
        own = kind.parts[0].range
        tiles = self.buffer[own.first_byte : own.end_byte].view(own.num_tiles, own.tile_bytes)
        numbers = own.numbers(self.tile_table[slots, layer].reshape(-1)).astype(np.int64)
        return tiles.index_select(0, torch.from_numpy(numbers).to(tiles.device))

    def write_tiles(self, slot: int, layer: int, tiles: Tiles) -> None:
        """Write one layer of a page as `read_tiles` returns it."""
        ids = self.tile_table[slot, layer]
        for part, heads in self._require(slot).in_layer(layer):
            self._storage.write(part.place, ids[heads], tiles[heads, : part.range.tile_bytes])

    def install(self, slot: int, layer: int, data: bytes | memoryview) -> int:
        """Write layers of a page from one on, each as `read` returned it; return how many.

        Raises `EngineError` where the size is wrong.
        """
        parts, at, end = self._require(slot).parts, layer, 0
        while 0 <= at < self.spec.num_layers and end < len(data):
            end += sum(self._sizes(slot, at)) if len(parts) > 1 else self._layer_bytes(parts[0])
            at += 1
        if not 0 <= layer < at or end != len(data):
            raise EngineError(
                f"layer {layer} with {len(data)} bytes does not fit a page of this pool"
            )
        if len(parts) == 1:
            tiles = np.frombuffer(data, np.uint8).reshape(-1, parts[0].range.tile_bytes)
            self._storage.write(parts[0].place, self.tile_table[slot, layer:at].reshape(-1), tiles)
        else:
            rest = np.frombuffer(data, np.uint8)
            for one in range(layer, at):
                rest = self._install_mixed(slot, one, rest)
        return at - layer

    def _install_mixed(self, slot: int, layer: int, data: Tiles) -> Tiles:
        """Write a layer of tiles of several sizes; return what follows it."""
        sizes = self._sizes(slot, layer)
        rows = np.zeros((len(sizes), max(sizes)), np.uint8)
        rows[np.arange(max(sizes)) < np.array(sizes)[:, None]] = data[: sum(sizes)]
        self.write_tiles(slot, layer, rows)
        return data[sum(sizes) :]

    def _layer_bytes(self, part: Part) -> int:
        return self.spec.num_kv_heads * part.range.tile_bytes

    def layer_kv(self, layer: int) -> LayerKV:
        """Return what kernels need for one layer; the same object every time."""
        return self._layers[layer]

    def _layer_kv(self, layer: int) -> LayerKV:
        spec = self.spec
        return LayerKV(
            self.buffer,
            self.tile_table,
            self._classes[0].parts[0].range.unit_bytes,
            layer,
            spec.num_kv_heads,
            spec.head_dim,
            self._storage.device_table,
            spec.coded_layouts(layer),
        )

    def _sizes(self, slot: int, layer: int) -> list[int]:
        """Return the bytes of each head's tile in a layer of a page."""
        sizes = np.zeros(self.spec.num_kv_heads, np.int64)
        for part, heads in self._require(slot).in_layer(layer):
            sizes[heads] = part.range.tile_bytes
        return [int(size) for size in sizes]

    def _class(self, kind: PageKind) -> PageClass:
        return self._classes[self._of[kind]]

    def _place_of(self, ids: Int32Array) -> int:
        """Return the range that tiles are of."""
        for part in self._parts():
            if part.range.holds(ids).all():
                return part.place
        raise EngineError("tiles of several sizes, or of none")

    def _drop(self, part: Part, ids: Int32Array) -> None:
        if self.sealed is not None:
            self.sealed.drop(part.place, ids)

    def _parts(self) -> list[Part]:
        return [part for own in self._classes for part in own.parts]

    def _require(self, slot: int) -> PageClass:
        """Return the class of a page in use."""
        for own in self._classes:
            if own.slots.is_used(slot - own.first_slot):
                return own
        raise EngineError(f"page slot {slot} is not in use")
