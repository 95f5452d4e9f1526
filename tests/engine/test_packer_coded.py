"""Packing coded pages: values move as they are, keys are coded once more, what stays is left be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvkeep.engine.packer import Packer
from kvkeep.eviction.corm import pack, unpack
from kvkeep.quant.by_head import ByHead
from kvkeep.quant.codec import Codec, Float, KVShape, Place, Tiles
from kvkeep.quant.hack import Hack
from kvkeep.types import PAGE_TOKENS, Layout
from kvkeep.watch import EvictState, Watch
from tests.cache.player import check, make_manager, pool_of, prompt

LAYERS, HEADS, DIM, RECENT = 2, 2, 32, 100
SHAPE = KVShape(LAYERS, HEADS, DIM, Layout.BF16)
TOKENS = prompt(1, 2, 3, 4, 5, 6, 7, 8, tail=10)
MIXED = ByHead([[Layout.K4V2, Layout.K2V2], [Layout.K2V2, Layout.K4V2]])
Seen = tuple[NDArray[np.float32], NDArray[np.float32]]


class World:
    """One view of coded pages, and which of its tokens live."""

    def __init__(self, codec: Codec, keep: float) -> None:
        self.codec = codec
        self.manager = make_manager(60, spec=codec.page_spec(SHAPE), num_first=4)
        self.manager.set_quotas({"a": 40}, 0)
        self.packer = Packer(SHAPE)
        self.rng = np.random.default_rng(1)
        match = self.manager.match(TOKENS, account="a", scope="a")
        self.view = self.manager.open_view(match, len(TOKENS))
        self.manager.extend(self.view, len(TOKENS))
        for page in range(8):
            for layer in range(LAYERS):
                rows = self.rng.standard_normal((2, HEADS, PAGE_TOKENS, DIM), np.float32)
                k, v = torch.from_numpy(rows).bfloat16()
                tiles = codec.encode(k, v, Place(layer, page == 0))
                pool_of(self.manager).write_tiles(int(self.view.slots[page]), layer, tiles)
        self.view.length = len(TOKENS)
        live = self.rng.random((LAYERS, 9, HEADS, PAGE_TOKENS)) < keep
        live[:, 6:] = True
        live[0, :, 0] &= keep < 0.5
        self.state = EvictState(
            pack(live), np.zeros(live.shape, np.int32), Watch(len(TOKENS), 0, 1, RECENT)
        )
        self.view.evict = self.state

    def pack(self) -> None:
        self.state.pending = True
        self.packer.pack(self.view, self.manager.packing)
        check(self.manager)

    def seen(self, layer: int, head: int) -> Seen:
        """Return keys and values of the live tokens of a head after its first page, in order."""
        view, pool = self.view, pool_of(self.manager)
        first = 1 if view.packed is None else view.packed.end
        own = [] if view.packed is None else view.packed.tiles[:, layer, head].tolist()
        ids = own + pool.tile_table[view.slots[first:8], layer, head].tolist()
        live = unpack(self.state.masks, (LAYERS, 1 + len(ids), HEADS, PAGE_TOKENS))
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for one, alive in zip(ids, live[layer, 1:, head], strict=True):
            if alive.any():
                raw = pool.read_ids(np.array([one], np.int32))
                for into, x in zip(found, self._values(raw, layer, head), strict=True):
                    into.append(x[0].float().numpy()[alive])
        k, v = (np.concatenate(parts) for parts in found)
        return k, v

    def _values(self, raw: Tiles, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        codec = self.codec
        if isinstance(codec, ByHead):
            codec = Hack(codec.layouts[layer][head])
        return codec.decode(raw, SHAPE, Place(layer, first=False))


def spread(x: NDArray[np.float32]) -> float:
    return float(np.sqrt((x**2).mean()))


@pytest.mark.parametrize(
    ("codec", "error"),
    [(Hack(Layout.K8V8), 0.01), (Hack(Layout.K4V2), 0.08), (Hack(Layout.K2V2), 0.3), (MIXED, 0.3)],
    ids=lambda one: getattr(one, "name", ""),
)
def test_live_tokens_move_and_memory_comes_back(codec: Codec, error: float) -> None:
    world = World(codec, keep=0.3)
    before = {at: world.seen(*at) for at in np.ndindex(LAYERS, HEADS)}
    used = world.manager.used("a")
    world.pack()
    assert world.view.packed is not None
    assert world.view.packed.end == 6
    tiles = (world.view.packed.tiles >= 0).sum(0)
    assert tiles.min() >= 1
    assert tiles.max() == 2, "five pages of tokens, a third of them alive"
    assert world.manager.used("a") == used - 5 + 2
    gone = 5 - tiles
    assert world.packer.freed_bytes == int((gone * codec.page_spec(SHAPE).tile_sizes()).sum())
    for at, (k, v) in before.items():
        new_k, new_v = world.seen(*at)
        np.testing.assert_array_equal(new_v, v)
        assert spread(new_k - k) < error * spread(k)
    world.manager.release(world.view, TOKENS[:0])
    assert world.manager.used("a") == 0


def test_what_is_coded_once_more_stays_so_until_much_of_it_is_gone() -> None:
    codec = Hack(Layout.K2V2)
    world = World(codec, keep=0.3)
    world.state.watch = Watch(len(TOKENS), 0, 1, 230)
    world.pack()
    packed = world.view.packed
    assert packed is not None
    assert packed.end == 4
    pool = pool_of(world.manager)
    whole = {
        at: packed.tiles[0, *at] for at in np.ndindex(LAYERS, HEADS) if packed.tiles[1, *at] > 0
    }
    assert whole, "some head has a full tile"
    bytes_of = {at: pool.read_ids(np.array([i], np.int32)).copy() for at, i in whole.items()}
    live = unpack(world.state.masks, (LAYERS, 8, HEADS, PAGE_TOKENS)).copy()
    live[:, 1, :, ::7] = False
    world.state.masks = pack(live)
    before = {at: world.seen(*at) for at in np.ndindex(LAYERS, HEADS)}
    world.state.watch = Watch(len(TOKENS), 0, 1, 9)
    world.pack()
    again = world.view.packed
    assert again is not None
    assert again.end == 8
    for at, one in whole.items():
        assert again.tiles[0, *at] == one
        np.testing.assert_array_equal(pool.read_ids(np.array([one], np.int32)), bytes_of[at])
    for at, (_, v) in before.items():
        np.testing.assert_array_equal(world.seen(*at)[1], v)


def test_pages_in_the_models_dtype_move_as_they_are() -> None:
    world = World(Float(), keep=0.3)
    before = {at: world.seen(*at) for at in np.ndindex(LAYERS, HEADS)}
    world.pack()
    assert world.view.packed is not None
    for at, (k, v) in before.items():
        new_k, new_v = world.seen(*at)
        np.testing.assert_array_equal(new_k, k)
        np.testing.assert_array_equal(new_v, v)
