from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kvkeep.cache.classes import Beside
from kvkeep.cache.pool import TilePool
from kvkeep.errors import ConfigError, EngineError, PoolExhausted
from kvkeep.types import Layout, PageKind, PageSpec, TileForm
from tests.cache.player import SPEC, tiles_of


def test_the_buffer_is_aligned_and_covers_all_tiles() -> None:
    pool = TilePool(SPEC, 3)
    assert pool.buffer.data_ptr() % 64 == 0
    assert pool.buffer.numel() == 3 * SPEC.page_bytes == tiles_of(pool).size
    tiles_of(pool)[1, 0] = 7
    assert int(pool.buffer[SPEC.tile_bytes]) == 7


def test_pages_have_distinct_tiles_until_the_pool_is_exhausted() -> None:
    pool = TilePool(SPEC, 3)
    slots = [pool.alloc_page() for _ in range(3)]
    assert sorted(pool.tile_table[slots].ravel().tolist()) == list(range(12))
    with pytest.raises(PoolExhausted, match="0 left"):
        pool.alloc_page()
    assert pool.free_pages == 0
    pool.free_page(slots[1])
    assert pool.free_pages == 1
    assert (pool.tile_table[slots[1]] == -1).all()


def test_a_page_comes_back_zeroed() -> None:
    pool = TilePool(SPEC, 2)
    first = pool.alloc_page()
    tiles_of(pool)[:] = 255
    pool.free_page(first)
    assert not tiles_of(pool)[pool.tile_table[pool.alloc_page()].ravel()].any()
    assert not tiles_of(pool)[pool.tile_table[pool.alloc_page()].ravel()].any()


def test_zeroing_and_copying_follow_scattered_tiles() -> None:
    pool = TilePool(SPEC, 3)
    private = pool.alloc_tiles(5)
    pool.free_tiles(private[[0, 2, 4, 1]])
    page, other = pool.alloc_page(), pool.alloc_page()
    tiles_of(pool)[pool.tile_table[page].ravel()] = 9
    tiles_of(pool)[private[3]] = 5
    pool.copy_page(page, other)
    assert (tiles_of(pool)[pool.tile_table[other].ravel()] == 9).all()
    assert (tiles_of(pool)[private[3]] == 5).all()
    pool.free_page(page)
    assert not tiles_of(pool)[pool.tile_table[pool.alloc_page()].ravel()].any()


def test_tiles_of_views_leave_less_room_for_pages() -> None:
    pool = TilePool(SPEC, 2)
    tiles = pool.alloc_tiles(1)
    assert pool.free_pages == 1
    pool.alloc_page()
    with pytest.raises(PoolExhausted):
        pool.alloc_page()
    pool.free_tiles(tiles)
    pool.alloc_page()
    assert pool.free_tiles_count == 0


def test_freeing_twice_or_what_was_never_taken_is_an_error() -> None:
    pool = TilePool(SPEC, 2)
    slot = pool.alloc_page()
    pool.free_page(slot)
    for bad in (slot, -1, 2):
        with pytest.raises(EngineError, match="not in use"):
            pool.free_page(bad)
    with pytest.raises(EngineError, match="not in use"):
        pool.copy_page(slot, slot)


def test_a_layer_is_read_and_installed_as_bytes() -> None:
    pool = TilePool(SPEC, 2)
    a, b = pool.alloc_page(), pool.alloc_page()
    tiles_of(pool)[pool.tile_table[a, 1, 0]] = 3
    tiles_of(pool)[pool.tile_table[a, 1, 1]] = 4
    data = pool.read(a, 1)
    assert data == bytes([3]) * 4096 + bytes([4]) * 4096
    pool.install(b, 1, data)
    assert pool.read(b, 1) == data
    assert not any(pool.read(b, 0))
    page = memoryview(bytearray(2 * len(data)))
    pool.read_page(a, page)
    assert page == pool.read(a, 0) + data
    both = pool.read(a, 0) + data
    assert (pool.install(b, 0, both), pool.install(b, 1, data)) == (2, 1)
    assert pool.read(b, 0) + pool.read(b, 1) == both
    for layer, wrong in (
        (1, data[1:]),
        (1, both),
        (2, data),
        (-1, data),
        (0, both + data),
        (0, b""),
    ):
        with pytest.raises(EngineError, match="does not fit"):
            pool.install(b, layer, wrong)


def test_layer_kv_is_made_once() -> None:
    pool = TilePool(SPEC, 1)
    kv = pool.layer_kv(1)
    assert kv is pool.layer_kv(1)
    assert (kv.layer, kv.num_kv_heads, kv.head_dim, kv.unit_bytes) == (1, 2, 8, 4096)
    assert kv.tile_table is pool.tile_table


@pytest.mark.parametrize(
    ("spec", "pages", "word"),
    [
        (SPEC, 0, "num_pages"),
        (PageSpec(Layout.F32, 1, 1, 8, 100), 1, "tile_bytes"),
        (PageSpec(Layout.F32, 1, 1, 8, 64), 2**62, "share of memory"),
    ],
)
def test_what_cannot_be_a_pool_is_refused(spec: PageSpec, pages: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        TilePool(spec, pages)


CODED = PageSpec(Layout.K2V2, 2, 2, 8, tile_bytes=192, window_tokens=128, first_extra_bytes=128)
BESIDE = Beside(num_first=3, num_staged=2, staged_tile_bytes=1024, num_kept=1)


def coded_pool() -> TilePool:
    return TilePool(CODED, 5, beside=BESIDE)


def test_pages_of_each_kind_have_tiles_of_their_own_size() -> None:
    pool = coded_pool()
    assert pool.buffer.numel() == 4 * (5 * 192 + 3 * 320 + 3 * 1024)
    assert [pool.bytes_of(kind) for kind in PageKind] == [4 * 5 * 192, 4 * 3 * 320, 4 * 2048, 4096]
    unit = pool.layer_kv(0).unit_bytes
    assert unit == 64
    sizes = {PageKind.PLAIN: 192, PageKind.FIRST: 320, PageKind.STAGED: 1024, PageKind.KEPT: 1024}
    taken: list[tuple[int, int]] = []
    for kind, size in sizes.items():
        while pool.free_of(kind):
            slot = pool.alloc_page(kind)
            assert pool.read_tiles(slot, 1).shape == (2, size)
            begins = pool.tile_table[slot].ravel().astype(int) * unit
            taken += [(int(begin), int(begin) + size) for begin in begins]
    taken.sort()
    assert taken[0][0] == 0
    assert taken[-1][1] == pool.buffer.numel()
    assert all(end == begin for (_, end), (begin, _) in pairwise(taken)), "tiles overlap"


def test_a_kind_that_is_used_up_takes_nothing_from_another() -> None:
    pool = coded_pool()
    first = [pool.alloc_page(PageKind.FIRST) for _ in range(3)]
    with pytest.raises(PoolExhausted):
        pool.alloc_page(PageKind.FIRST)
    assert [pool.free_of(kind) for kind in PageKind] == [5, 0, 2, 1]
    assert pool.free_pages == 2, "a first page is one of the pool's pages"
    pool.free_page(first[1])
    assert pool.free_of(PageKind.FIRST) == 1
    staged = pool.alloc_page(PageKind.STAGED)
    assert pool.free_pages == 3, "a staged page is not"
    with pytest.raises(EngineError, match="own kind"):
        pool.copy_page(first[0], staged)


def test_a_first_page_is_read_and_installed_with_all_its_bytes() -> None:
    pool = coded_pool()
    one, other = pool.alloc_page(PageKind.FIRST), pool.alloc_page(PageKind.FIRST)
    tiles = np.random.default_rng(1).integers(0, 256, (2, 320)).astype(np.uint8)
    pool.write_tiles(one, 1, tiles)
    pool.install(other, 1, pool.read(one, 1))
    assert np.array_equal(pool.read_tiles(other, 1), tiles)
    with pytest.raises(EngineError, match="does not fit"):
        pool.install(pool.alloc_page(), 1, pool.read(one, 1))
    pool.free_page(one)
    assert not pool.read_tiles(pool.alloc_page(PageKind.FIRST), 1).any()


MIXED = PageSpec(
    Layout.BY_HEAD,
    2,
    2,
    8,
    tile_bytes=320,
    window_tokens=128,
    first_extra_bytes=128,
    forms=(
        (TileForm(Layout.K4V2, 320), TileForm(Layout.K2V2, 192)),
        (TileForm(Layout.K2V2, 192), TileForm(Layout.K2V2, 192)),
    ),
)


def test_tiles_of_several_sizes_make_up_a_page_and_overlap_nowhere() -> None:
    pool = TilePool(MIXED, 5, beside=BESIDE)
    assert MIXED.page_bytes == 3 * 192 + 320
    assert pool.buffer.numel() == 5 * MIXED.page_bytes + 3 * MIXED.first_page_bytes + 12 * 1024
    sizes = [pool.bytes_of(kind) for kind in PageKind]
    assert sizes == [5 * MIXED.page_bytes, 3 * MIXED.first_page_bytes, 8 * 1024, 4 * 1024]
    unit = pool.layer_kv(0).unit_bytes
    extra = {PageKind.PLAIN: 0, PageKind.FIRST: 128}
    taken: list[tuple[int, int]] = []
    for kind, more in extra.items():
        while pool.free_of(kind):
            begins = pool.tile_table[pool.alloc_page(kind)].astype(int) * unit
            ends = begins + MIXED.tile_sizes() + more
            taken += zip(begins.ravel().tolist(), ends.ravel().tolist(), strict=True)
    taken.sort()
    assert taken[0][0] == 0
    assert taken[-1][1] == pool.buffer.numel() - 12 * 1024
    assert all(end == begin for (_, end), (begin, _) in pairwise(taken))
    assert pool.free_tiles_count == 0


def test_tiles_of_several_sizes_are_read_written_copied_and_installed() -> None:
    pool = TilePool(MIXED, 4, beside=BESIDE)
    one, other, third = (pool.alloc_page() for _ in range(3))
    tiles = np.random.default_rng(1).integers(1, 256, (2, 320)).astype(np.uint8)
    tiles[1, 192:] = 0
    pool.write_tiles(one, 0, tiles)
    pool.write_tiles(one, 1, tiles)
    assert np.array_equal(pool.read_tiles(one, 0), tiles)
    assert np.array_equal(pool.read_tiles(one, 1), tiles[:, :192])
    assert pool.read(one, 0) == tiles[0].tobytes() + tiles[1, :192].tobytes()
    whole = memoryview(bytearray(len(pool.read(one, 0) + pool.read(one, 1))))
    pool.read_page(one, whole)
    assert whole == pool.read(one, 0) + pool.read(one, 1)
    pool.copy_page(one, other)
    for layer in (0, 1):
        pool.install(third, layer, pool.read(other, layer))
        assert np.array_equal(pool.read_tiles(third, layer), pool.read_tiles(one, layer))
    fourth = pool.alloc_page()
    assert pool.install(fourth, 0, whole) == 2
    assert (pool.read(fourth, 0), pool.read(fourth, 1)) == (pool.read(one, 0), pool.read(one, 1))
    with pytest.raises(EngineError, match="does not fit"):
        pool.install(third, 1, pool.read(one, 0))
    pool.free_page(one)
    again = pool.alloc_page()
    assert not any(pool.read_tiles(again, layer).any() for layer in (0, 1))


def test_a_layer_says_what_its_heads_are_stored_in() -> None:
    pool = TilePool(MIXED, 1)
    coded = [pool.layer_kv(layer).coded for layer in (0, 1)]
    assert [None if one is None else one.tolist() for one in coded] == [
        [Layout.K4V2, Layout.K2V2],
        [Layout.K2V2, Layout.K2V2],
    ]
    assert TilePool(CODED, 1).layer_kv(0).coded is None


def test_tiles_of_a_view_are_of_the_size_of_their_place() -> None:
    pool = TilePool(MIXED, 2)
    wide, narrow = pool.alloc_tiles(2, 0, 0), pool.alloc_tiles(6, 1, 1)
    with pytest.raises(PoolExhausted):
        pool.alloc_tiles(1, 0, 0)
    with pytest.raises(PoolExhausted, match="no free page"):
        pool.alloc_page()
    pool.free_tiles(np.concatenate([narrow, wide]))
    assert pool.free_pages == 2
    with pytest.raises(EngineError, match="not in use"):
        pool.free_tiles(np.array([1 << 20], np.int32))


def test_without_more_bytes_at_the_start_first_pages_are_like_any_other() -> None:
    pool = TilePool(SPEC, 2)
    assert pool.bytes_of(PageKind.FIRST) == 0
    pool.alloc_page(PageKind.FIRST)
    assert [pool.free_of(kind) for kind in PageKind] == [1, 1, 1, 1]
