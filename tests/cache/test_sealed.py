"""Tiles that are sealed while nobody attends to them: bytes, nonces, changes, room."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.cache.pool import TilePool
from kvkeep.cache.sealed import SealedTiles
from kvkeep.errors import SealError
from kvkeep.shield import tiles as shield_tiles
from kvkeep.shield.tiles import TileCipher, TileKeys
from kvkeep.types import Layout, PageSpec

LAYERS, HEADS, TILE = 3, 2, 1024
SPEC = PageSpec(Layout.F32, LAYERS, HEADS, 16, TILE)


def pool_of(pages: int = 6, scratch_tiles: int = 16) -> TilePool:
    cipher = TileCipher(TileKeys())
    make = partial(SealedTiles, cipher=cipher, scratch_bytes=scratch_tiles * TILE)
    return TilePool(SPEC, pages, make)


def fill(pool: TilePool, slot: int, seed: int) -> np.ndarray:
    """Write a page as kernels do, past the storage; return its tiles [L, Hkv, bytes]."""
    made = np.random.default_rng(seed).integers(1, 256, (LAYERS, HEADS, TILE), np.uint8)
    for layer in range(LAYERS):
        for head in range(HEADS):
            at = int(pool.tile_table[slot, layer, head]) * pool.layer_kv(0).unit_bytes
            pool.buffer.numpy()[at : at + TILE] = made[layer, head]
    return made


def page_of(pool: TilePool, slot: int) -> bytes:
    into = bytearray(SPEC.page_bytes)
    pool.read_page(slot, memoryview(into))
    return bytes(into)


def sealed_of(pool: TilePool) -> SealedTiles:
    assert pool.sealed is not None
    return pool.sealed


def test_a_sealed_page_reads_as_it_was_and_lies_in_memory_as_something_else() -> None:
    pool = pool_of()
    slot = pool.alloc_page()
    made = fill(pool, slot, 1)
    held = pool.buffer.numpy().tobytes()
    assert all(made[at].tobytes() in held for at in np.ndindex(LAYERS, HEADS))
    pool.seal(slot)
    held = pool.buffer.numpy().tobytes()
    assert not any(made[at].tobytes()[:32] in held for at in np.ndindex(LAYERS, HEADS))
    assert page_of(pool, slot) == made.tobytes()
    assert pool.read(slot, 1) == made[1].tobytes()


def test_what_is_written_whole_is_sealed_at_once() -> None:
    pool = pool_of()
    made = np.random.default_rng(3).integers(1, 256, (LAYERS, HEADS, TILE), np.uint8)
    slot = pool.alloc_page()
    assert pool.install(slot, 0, made.tobytes()) == LAYERS
    assert made[0, 0].tobytes()[:32] not in pool.buffer.numpy().tobytes()
    assert page_of(pool, slot) == made.tobytes()
    pool.write_tiles(slot, 1, made[2])
    assert pool.read(slot, 1) == made[2].tobytes()


def test_a_copy_of_a_sealed_page_outlives_it() -> None:
    pool = pool_of()
    one, two = pool.alloc_page(), pool.alloc_page()
    made = fill(pool, one, 4)
    pool.seal(one)
    pool.copy_page(one, two)
    pool.free_page(one)
    assert page_of(pool, two) == made.tobytes()


def test_plain_pages_are_zeroed_as_they_are_freed() -> None:
    pool = pool_of()
    slot = pool.alloc_page()
    made = fill(pool, slot, 5)
    pool.free_page(slot)
    assert made[0, 0].tobytes()[:32] not in pool.buffer.numpy().tobytes()


def test_open_tiles_stand_in_the_scratch_until_it_is_closed() -> None:
    pool = pool_of()
    tiles, unit = sealed_of(pool), pool.layer_kv(0).unit_bytes
    plain, shut = pool.alloc_page(), pool.alloc_page()
    made = {plain: fill(pool, plain, 6), shut: fill(pool, shut, 7)}
    pool.seal(shut)
    ids = pool.tile_table[[plain, shut], 1].reshape(-1)
    opened, changed, end = tiles.open(ids, 0)
    assert end == HEADS * TILE
    assert not changed.any()
    assert opened[:HEADS].tolist() == ids[:HEADS].tolist(), "plain tiles stay where they are"
    memory = pool.buffer.numpy()
    for i, slot in enumerate((plain, plain, shut, shut)):
        at = int(opened[i]) * unit
        assert memory[at : at + TILE].tobytes() == made[slot][1, i % HEADS].tobytes()
    tiles.close()
    assert made[shut][1, 0].tobytes()[:32] not in memory.tobytes()


def test_a_flip_of_any_bit_of_a_tile_its_tag_or_its_count_opens_nothing() -> None:
    pool = pool_of()
    tiles, slot = sealed_of(pool), pool.alloc_page()
    made = fill(pool, slot, 8)
    pool.seal(slot)
    ids = pool.tile_table[slot, 0]
    (number,) = tiles._ranges[0].numbers(ids[:1]).tolist()
    places: list[Callable[[], np.ndarray]] = [
        lambda: tiles._tiles[0][number],
        lambda: tiles._tags[0][number],
        lambda: tiles._counts[0][number : number + 1].view(np.uint8),
    ]
    for place in places:
        for byte in range(0, len(place()), 37):
            place()[byte] ^= 1 << byte % 8
            opened, changed, _ = tiles.open(ids, 0)
            assert changed.tolist() == [True, False]
            at = int(opened[0]) * pool.layer_kv(0).unit_bytes
            assert not pool.buffer.numpy()[at : at + TILE].any(), "nothing of it is given out"
            with pytest.raises(SealError, match="changed"):
                page_of(pool, slot)
            place()[byte] ^= 1 << byte % 8
    assert page_of(pool, slot) == made.tobytes()


def test_more_than_the_scratch_holds_is_refused() -> None:
    pool = pool_of(scratch_tiles=2)
    slots = [pool.alloc_page() for _ in range(2)]
    for slot in slots:
        pool.seal(slot)
    with pytest.raises(SealError, match="scratch"):
        sealed_of(pool).open(pool.tile_table[slots, 0].reshape(-1), 0)


class Recorded:
    """An `AESGCM` that notes the nonces it seals under."""

    seen: ClassVar[list[bytes]] = []

    def __init__(self, key: memoryview) -> None:
        self._own = AESGCM(key)

    def encrypt_into(self, nonce: bytes, *rest: object) -> int:
        self.seen.append(bytes(nonce))
        return self._own.encrypt_into(nonce, *rest)  # type: ignore[arg-type]

    def decrypt_into(self, *rest: object) -> int:
        return self._own.decrypt_into(*rest)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("asiwcft"), st.integers(0, 5)), max_size=40))
def test_no_nonce_comes_twice_and_every_page_reads_as_written(
    doings: list[tuple[str, int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shield_tiles, "AESGCM", Recorded)
        Recorded.seen.clear()
        pool = pool_of()
        wanted: dict[int, bytes] = {}
        shut: set[int] = set()
        for step, (what, at) in enumerate(doings):
            slot = list(wanted)[at % len(wanted)] if wanted else -1
            made = np.full((LAYERS, HEADS, TILE), step % 250 + 1, np.uint8)
            if what == "a" and pool.free_pages:
                slot = pool.alloc_page()
                wanted[slot] = fill(pool, slot, step).tobytes()
            elif slot >= 0 and what == "s":
                pool.seal(slot)
                shut.add(slot)
            elif slot >= 0 and what in "iw":
                pool.install(slot, 0, made.tobytes())
                wanted[slot] = made.tobytes()
                shut.add(slot)
            elif slot >= 0 and what == "c" and pool.free_pages:
                twin = pool.alloc_page()
                pool.copy_page(slot, twin)
                wanted[twin] = wanted[slot]
            elif slot >= 0 and what == "t":
                sealed_of(pool).open(pool.tile_table[slot, 0], 0)
                sealed_of(pool).close()
            elif slot >= 0 and what == "f":
                pool.free_page(slot)
                del wanted[slot]
                shut.discard(slot)
            assert all(page_of(pool, one) == raw for one, raw in wanted.items())
        assert len(Recorded.seen) == len(set(Recorded.seen))
        assert len(Recorded.seen) >= len(shut)
