"""Packing: live tokens move, in order, to tiles of a view; masks and stamps go with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvkeep.cache.manager import CacheManager
from kvkeep.engine.packer import Packer
from kvkeep.errors import QuotaExceeded
from kvkeep.eviction.corm import NEVER, pack, unpack
from kvkeep.eviction.packing import arrangement
from kvkeep.eviction.policy import positions
from kvkeep.ops.layout import TORCH_DTYPE
from kvkeep.quant.codec import Float, KVShape, pack_float_tiles, unpack_float_tiles
from kvkeep.types import PAGE_TOKENS, Layout, View
from kvkeep.watch import EvictState, Watch
from tests.cache.player import check, make_manager, pool_of, prompt

LAYERS, HEADS, DIM, RECENT = 2, 2, 16, 150
TOKENS = prompt(1, 2, 3, 4, 5, 6, 7, tail=20)
LENGTH = len(TOKENS)


@pytest.fixture(params=[Layout.F32, Layout.BF16, Layout.ROWS_BF16])
def shape(request: pytest.FixtureRequest) -> KVShape:
    return KVShape(LAYERS, HEADS, DIM, request.param)


class World:
    """One view of random keys and values, and which of them live."""

    def __init__(
        self, shape: KVShape, quota: int = 30, keep: float = 0.3, tokens: list[int] = TOKENS
    ) -> None:
        self.shape = shape
        spec = Float().page_spec(shape)
        self.manager: CacheManager = make_manager(max(40, quota), spec=spec)
        length = len(tokens)
        self.manager.set_quotas({"a": quota}, 0)
        self.packer = Packer(shape)
        match = self.manager.match(tokens, account="a", scope="a")
        self.view = self.manager.open_view(match, length)
        self.manager.extend(self.view, length)
        self.rng = np.random.default_rng(0)
        rows = self.rng.standard_normal((2, LAYERS, HEADS, self.room, DIM), np.float32)
        self.kv = torch.from_numpy(rows).to(TORCH_DTYPE[shape.layout])
        for page in range(self.view.num_pages):
            for layer in range(LAYERS):
                k, v = self.kv[:, layer, :, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
                tiles = pack_float_tiles(k, v, shape.layout)
                pool_of(self.manager).write_tiles(int(self.view.slots[page]), layer, tiles)
        self.manager.commit(self.view, tokens)
        self.live = self.rng.random((LAYERS, HEADS, self.room)) < keep
        self.live[0, 1, 64:] &= keep > 0.9
        self.live[..., length - RECENT :] = True
        stamps = np.arange(self.room * HEADS * LAYERS, dtype=np.int32)
        self.stamps = stamps.reshape(LAYERS, HEADS, self.room)
        self.state = EvictState(
            pack(self._tiled(self.live)), self._tiled(self.stamps), Watch(length, 0, 1, RECENT)
        )
        self.view.evict = self.state
        self.evicted()

    @property
    def room(self) -> int:
        return self.view.num_pages * PAGE_TOKENS

    def evicted(self) -> None:
        self.state.pending = True
        self.view.taint(self.view.length)

    def pack(self) -> None:
        self.packer.pack(self.view, self.manager.packing)
        check(self.manager)

    def seen(self, view: View, layer: int, head: int) -> list[tuple[int, list[float]]]:
        """Return (stamp, key and value) of each token that a head of the view attends to."""
        assert view.evict is not None
        table = pool_of(self.manager).tile_table
        ids = [int(table[view.slots[0], layer, head])]
        first = 1
        if view.packed is not None:
            ids += view.packed.tiles[:, layer, head].tolist()
            first = view.packed.end
        ids += table[view.slots[first : view.num_pages], layer, head].tolist()
        full = (LAYERS, len(ids), HEADS, PAGE_TOKENS)
        live = unpack(view.evict.masks, full)[layer, :, head]
        found = []
        for entry, one in enumerate(ids):
            if not live[entry].any():
                continue
            raw = pool_of(self.manager).read_ids(np.array([one], np.int32))
            k, v = unpack_float_tiles(raw, self.shape)
            for at in np.flatnonzero(live[entry]):
                stamp = int(view.evict.last_hit[layer, entry, head, at])
                found.append((stamp, torch.cat([k[0, at], v[0, at]]).tolist()))
        return found

    def wanted(self, layer: int, head: int) -> list[tuple[int, list[float]]]:
        return [
            (int(self.stamps[layer, head, t]), self.kv[:, layer, head, t].flatten().tolist())
            for t in np.flatnonzero(self.live[layer, head])
        ]

    def check_seen(self, view: View) -> None:
        for layer, head in np.ndindex(LAYERS, HEADS):
            assert self.seen(view, layer, head) == self.wanted(layer, head)

    @staticmethod
    def _tiled(x: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(np.moveaxis(x.reshape(LAYERS, HEADS, -1, PAGE_TOKENS), 1, 2))


def test_live_tokens_move_in_order_and_pages_are_let_go(shape: KVShape) -> None:
    world = World(shape)
    before = world.manager.used("a")
    world.check_seen(world.view)
    world.pack()
    world.check_seen(world.view)
    packed = world.view.packed
    assert packed is not None
    assert packed.end == (LENGTH - RECENT) // PAGE_TOKENS // 2 * 2 == 4
    assert (packed.tiles[:, 0, 1] == -1).all(), "a head that kept nothing has no tile"
    assert (packed.tiles >= 0).sum(0).tolist() == [[2, 0], [1, 2]], "as many as each head needs"
    assert positions(world.state, 5)[:, 0].tolist() == [0, 64, 128, 256, 320]
    again = world.manager.match(TOKENS, account="a", scope="a")
    assert again.cached_tokens >= 7 * PAGE_TOKENS, "the prompt stays cached, whole"
    assert world.manager.used("a") == before + 2 + 3, "own tiles and copies of the tail"
    assert world.manager.evict_pages("a", 40) == 6, "all of it but the first page may go"
    world.check_seen(world.view)
    world.manager.release(world.view, TOKENS)
    world.manager.evict_pages("a", 40)
    assert world.manager.used("a") == 0


def test_what_dies_later_is_packed_again_in_place(shape: KVShape) -> None:
    world = World(shape, keep=0.7)
    world.pack()
    assert world.view.packed is not None
    first = world.view.packed
    world.state.watch = Watch(LENGTH, 0, 1, 20)
    dead = world.rng.random(world.live.shape) < 0.6
    dead[..., LENGTH - 20 :] = False
    old = [world.seen(world.view, *at) for at in np.ndindex(LAYERS, HEADS)]
    world.live &= ~dead
    full = (LAYERS, world.view.num_pages - world.state.gap, HEADS, PAGE_TOKENS)
    bits = unpack(world.state.masks, full).copy()
    for (layer, head), tokens in zip(np.ndindex(LAYERS, HEADS), old, strict=True):
        there = np.argwhere(bits[layer, :, head])
        kept = {stamp for stamp, _ in world.wanted(layer, head)}
        for (entry, at), (stamp, _) in zip(there, tokens, strict=True):
            bits[layer, entry, head, at] = stamp in kept
    world.state.masks = pack(bits)
    world.check_seen(world.view)
    world.evicted()
    world.pack()
    world.check_seen(world.view)
    assert world.view.packed.end == 6
    reused = set(first.tiles.ravel()) & set(world.view.packed.tiles.ravel()) - {-1}
    assert reused, "tiles are used again where they are"
    own = world.state.last_hit[0, 1 : world.state.packed_end, 1].ravel()
    count = int(world.live[0, 1, 64 : 6 * 64].sum())
    assert (own[:count] >= 0).all()
    assert (own[count:] == NEVER).all()


def test_forks_hold_the_same_tiles_until_one_is_packed_again(shape: KVShape) -> None:
    world = World(shape)
    world.pack()
    used = world.manager.used("a")
    twin = world.manager.fork(world.view)
    assert world.manager.used("a") == used + 1, "the open page alone"
    world.check_seen(twin)
    check(world.manager)
    world.state.watch = Watch(LENGTH, 0, 1, 20)
    world.evicted()
    world.pack()
    world.check_seen(world.view)
    world.check_seen(twin)
    world.manager.release(world.view, TOKENS)
    check(world.manager)
    world.check_seen(twin)
    world.manager.release(twin, TOKENS)
    check(world.manager)


def test_without_room_everything_stays_as_it_was(shape: KVShape) -> None:
    world = World(shape, quota=8)
    with pytest.raises(QuotaExceeded):
        world.pack()
    check(world.manager)
    world.check_seen(world.view)
    assert world.state.pending
    assert world.view.packed is None
    world.manager.set_quotas({"a": 10}, 0)
    world.pack()
    world.check_seen(world.view)
    assert world.view.packed is not None


@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_moving_takes_little_more_memory_than_there_was(shape: KVShape, keep: float) -> None:
    """What was moved is let go of at once: two hundredths of the pages are enough beside them."""
    tokens = prompt(*range(1, 129), tail=20)
    world = World(shape, quota=129 + 2, keep=keep, tokens=tokens)
    world.pack()
    assert world.view.packed is not None
    assert world.view.packed.end == 124
    world.check_seen(world.view)
    held = world.manager.used("a") - len(world.manager._store.accounts["a"].unreferenced)
    assert held <= (keep + 0.1) * 129
    world.manager.release(world.view, tokens)


def test_without_any_room_for_that_nothing_is_moved(shape: KVShape) -> None:
    tokens = prompt(*range(1, 129), tail=20)
    world = World(shape, quota=129, keep=0.25, tokens=tokens)
    with pytest.raises(QuotaExceeded, match="more pages to pack a sequence"):
        world.pack()
    world.check_seen(world.view)


def test_memory_that_others_hold_too_makes_no_room(shape: KVShape) -> None:
    """Pages of a snapshot lie over the same memory: letting go of them frees a share alone."""
    tokens = prompt(*range(1, 129), tail=20)
    world = World(shape, quota=129 + 3, keep=0.25, tokens=tokens)
    pool, slots = pool_of(world.manager), world.view.slots[1:128].tolist()
    for slot in slots:
        pool.hold_page(slot)
    with pytest.raises(QuotaExceeded, match="more pages to pack a sequence"):
        world.packer.pack(world.view, world.manager.packing)
    world.check_seen(world.view)
    for slot in slots:
        pool.free_page(slot)
    world.pack()
    world.check_seen(world.view)
    assert world.view.packed is not None


def test_what_would_not_pay_is_left_alone(shape: KVShape) -> None:
    world = World(shape, keep=0.95)
    world.pack()
    assert world.view.packed is None
    assert not world.state.pending


def test_tiles_that_lost_little_stay_where_they_are(shape: KVShape) -> None:
    """Later packings append, until a tenth of a head's tiles would be saved."""
    world = World(shape, quota=99, tokens=prompt(*range(1, 65), tail=20))
    world.pack()
    first = world.view.packed
    assert first is not None
    world.state.watch = Watch(world.state.watch.prompt_tokens, 0, 1, 20)
    for lost in (1, 24):
        world.state.masks = world.state.masks.copy()
        world.state.masks[1 : 1 + len(first.tiles)] &= ~np.uint64((1 << lost) - 1)
        found = arrangement(world.view, None)
        assert found is not None
        for layer, head in np.ndindex(LAYERS, HEADS):
            full = max(0, int((first.tiles[:, layer, head] >= 0).sum()) - 1)
            stays = found.stays[:full, layer, head]
            assert np.array_equal(stays, np.arange(full)) if lost == 1 else (stays < 0).all()
    before = [world.seen(world.view, *at) for at in np.ndindex(LAYERS, HEADS)]
    world.evicted()
    world.pack()
    assert [world.seen(world.view, *at) for at in np.ndindex(LAYERS, HEADS)] == before
