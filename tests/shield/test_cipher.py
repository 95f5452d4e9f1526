from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.errors import KeysGone, SealError
from kvkeep.sealing import NAME_BYTES, PUBLIC_OWNER, SHELF_BYTES, SealContext, layers_of
from kvkeep.shield import envelope
from kvkeep.shield.cipher import FrameSealer, PageKey, Pages, suite_of
from kvkeep.shield.frame import (
    HEADER_BYTES,
    SLICE_BYTES,
    TAG_BYTES,
    Suite,
    plan_frame,
)
from kvkeep.types import PUBLIC_SCOPE, PageKind, PageTag
from tests.shield import reference

CONTEXT = SealContext("acme", PageTag("scope"), b"h" * 32, b"m" * 32, b"s" * 16)
SMALL = (300, 20, 7)
MIXED = (1000, SLICE_BYTES - 1001, 2, 3, 2 * SLICE_BYTES + 9, 40, SLICE_BYTES)


class Ring:
    """Epoch keys in plain sight; remembers the key of every page that it granted."""

    def __init__(self, *epochs: bytes, shelf: bytes | None = b"s" * 32) -> None:
        self.shelf = shelf
        self.newest = 0
        self.epochs = dict(enumerate(epochs or (b"k" * 32,), start=1))
        self.granted: list[tuple[bytes, bytes]] = []
        self.given: list[PageKey] = []
        self.asked: list[int] = []
        """Pages that each call for known keys was about."""

    def name_key(self, owner: str) -> bytes | None:
        return None if owner == "nobody" else owner.encode().ljust(32, b"n")

    def shelf_key(self) -> bytes | None:
        return self.shelf

    def fresh(self, owner: str, page_id: bytes) -> PageKey:
        return self._made(max(self.epochs), owner, page_id, 0)

    def known(self, owner: str, epoch: int, pages: Pages) -> list[PageKey]:
        self.asked.append(len(pages))
        if epoch not in self.epochs:
            raise KeysGone("no such epoch")
        return [self._made(epoch, owner, *page) for page in pages]

    def _made(self, epoch: int, owner: str, page_id: bytes, generation: int) -> PageKey:
        material = envelope.page_material(self.key(epoch, owner), page_id, generation)
        self.granted.append((material[:32], page_id))
        self.given.append(PageKey(epoch, memoryview(bytearray(material)), self.newest))
        return self.given[-1]

    def key(self, epoch: int, owner: str) -> bytes:
        return bytes(a ^ b for a, b in zip(self.epochs[epoch], owner.encode().ljust(32)))


def page(sizes: Sequence[int]) -> list[bytes]:
    return [os.urandom(size) for size in sizes]


def sealed(sealer: FrameSealer, context: SealContext, layers: Sequence[bytes]) -> memoryview:
    return sealer.seal(context, b"".join(layers), [len(layer) for layer in layers])


def opened(
    sealer: FrameSealer,
    context: SealContext,
    frame: bytes | bytearray | memoryview,
    sizes: Sequence[int],
) -> list[bytes]:
    return [bytes(x) for x in layers_of(sealer.open(context, memoryview(frame), sizes), sizes)]


def refused(sealer: FrameSealer, context: SealContext, frame: bytes, sizes: Sequence[int]) -> None:
    """Nothing at all is yielded of these bytes."""
    layers = sealer.open(context, memoryview(frame), sizes)
    with pytest.raises(SealError):
        next(layers)


@pytest.mark.parametrize("suite", list(Suite))
@pytest.mark.parametrize("sizes", [SMALL, MIXED, (1,), (SLICE_BYTES,), (SLICE_BYTES // 2,) * 3])
def test_a_frame_opens_and_is_the_references(suite: Suite, sizes: tuple[int, ...]) -> None:
    ring = Ring(b"1" * 32, b"2" * 32)
    sealer, layers = FrameSealer(ring, suite), page(sizes)
    frame = sealed(sealer, CONTEXT, layers)
    assert opened(sealer, CONTEXT, frame, sizes) == layers
    assert len(frame) == sealer.frame_bytes(sizes)
    page_id = bytes(frame[8:24])
    expected = reference.seal(ring.key(2, "acme"), page_id, 2, 0, suite, CONTEXT, layers)
    assert bytes(frame) == expected
    assert all(bytes(key.material) == bytes(64) for key in ring.given), "keys were wiped"


@given(st.lists(st.integers(1, SLICE_BYTES), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_plans_cover_every_byte_once(sizes: list[int]) -> None:
    plan = plan_frame(sizes)
    at, frame_at = 0, HEADER_BYTES
    ends, parts = list(accumulate(sizes)), {}
    for piece, (first, last, part, number, length) in zip(
        plan.slices, reference.pieces(sizes), strict=True
    ):
        assert struct.unpack("<III", piece.nonce) == (first, part, number)
        assert struct.unpack("<IIII", piece.place) == (part, number, first, last)
        assert piece.plain == slice(at, at + length)
        assert piece.sealed == slice(frame_at, frame_at + length + TAG_BYTES)
        assert length <= SLICE_BYTES
        at, frame_at = piece.plain.stop, piece.sealed.stop
        parts[part] = ends[last - 1]
    assert (at, frame_at) == (plan.plain_bytes, plan.frame_bytes) == (sum(sizes), frame_at)
    assert [one.plain.stop for one in plan.slices if one.whole] == list(parts.values())
    assert ends[-1] == at
    assert len({piece.nonce for piece in plan.slices}) == len(plan.slices)


@pytest.mark.parametrize("sizes", [(), (0,), (4, 0)])
def test_pages_of_nothing_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(SealError, match="layers"):
        FrameSealer(Ring()).frame_bytes(sizes)


def test_a_page_of_another_length_than_its_layers_is_not_sealed() -> None:
    with pytest.raises(SealError, match="not as long as its layers"):
        FrameSealer(Ring()).seal(CONTEXT, bytes(9), [4, 4])


def test_a_flip_of_any_byte_opens_nothing() -> None:
    sealer = FrameSealer(Ring(b"1" * 32, b"2" * 32))
    frame = bytearray(sealed(sealer, CONTEXT, page(SMALL)))
    assert len(frame) == HEADER_BYTES + sum(SMALL) + TAG_BYTES
    for at in range(len(frame)):
        frame[at] ^= 1 << (at % 8)
        refused(sealer, CONTEXT, bytes(frame), SMALL)
        frame[at] ^= 1 << (at % 8)
    assert len(opened(sealer, CONTEXT, frame, SMALL)) == len(SMALL)


def test_layers_before_a_flip_are_proven_and_no_other_comes() -> None:
    sizes = (SLICE_BYTES, SLICE_BYTES, SLICE_BYTES + 5)
    sealer, layers = FrameSealer(Ring()), page(sizes)
    frame = bytearray(sealed(sealer, CONTEXT, layers))
    frame[-1] ^= 1
    coming = sealer.open(CONTEXT, memoryview(frame), sizes)
    assert [next(coming), next(coming)] == layers[:2]
    with pytest.raises(SealError, match="changed"):
        next(coming)  # its first slice was sound, its second was not


@pytest.mark.parametrize(
    "other",
    [
        replace(CONTEXT, owner="rival"),
        replace(CONTEXT, tag=PageTag("other")),
        replace(CONTEXT, tag=PageTag(PUBLIC_SCOPE)),
        replace(CONTEXT, chain_hash=b"i" * 32),
        replace(CONTEXT, model_digest=b"n" * 32),
        replace(CONTEXT, spec_digest=b"t" * 16),
        replace(CONTEXT, kind=PageKind.KEPT),
    ],
)
def test_a_page_of_another_context_opens_nothing(other: SealContext) -> None:
    sealer = FrameSealer(Ring())
    refused(sealer, other, bytes(sealed(sealer, CONTEXT, page(SMALL))), SMALL)
    assert sealer.name_of(other) != sealer.name_of(CONTEXT)


def _swap_layers(frame: bytearray) -> None:
    size = SLICE_BYTES + TAG_BYTES
    one, two = slice(HEADER_BYTES, HEADER_BYTES + size), slice(-size, None)
    frame[one], frame[two] = frame[two], frame[one]


def _other_epoch(frame: bytearray) -> None:
    frame[24:28] = struct.pack("<I", 1)


def _lost_epoch(frame: bytearray) -> None:
    frame[24:28] = struct.pack("<I", 9)


def _other_generation(frame: bytearray) -> None:
    frame[28:32] = struct.pack("<I", 1)


def _truncated(frame: bytearray) -> None:
    del frame[-1]


def _header_alone(frame: bytearray) -> None:
    del frame[40:]


def _longer(frame: bytearray) -> None:
    frame.append(0)


def _other_suite(frame: bytearray) -> None:
    frame[4] = 3 - frame[4]


@pytest.mark.parametrize(
    "change",
    [
        _swap_layers,
        _other_epoch,
        _lost_epoch,
        _other_generation,
        _truncated,
        _header_alone,
        _longer,
        _other_suite,
    ],
)
def test_a_rearranged_frame_opens_nothing(change: Callable[[bytearray], None]) -> None:
    sizes = (SLICE_BYTES, SLICE_BYTES)
    sealer = FrameSealer(Ring(b"1" * 32, b"2" * 32))
    frame = bytearray(sealed(sealer, CONTEXT, page(sizes)))
    change(frame)
    refused(sealer, CONTEXT, bytes(frame), sizes)


def test_other_sizes_of_the_same_length_open_nothing() -> None:
    sealer = FrameSealer(Ring())
    frame = bytes(sealed(sealer, CONTEXT, page((300, 20, 7))))
    refused(sealer, CONTEXT, frame, (20, 300, 7))


def test_the_right_commitment_does_not_open_bytes_of_another_key() -> None:
    ring = Ring()
    sealer = FrameSealer(ring)
    mine = bytearray(sealed(sealer, CONTEXT, page(SMALL)))
    rival = sealed(sealer, replace(CONTEXT, owner="rival"), page(SMALL))
    mine[HEADER_BYTES:] = rival[HEADER_BYTES:]
    refused(sealer, CONTEXT, bytes(mine), SMALL)
    foreign = FrameSealer(Ring(b"x" * 32))
    refused(foreign, CONTEXT, bytes(sealed(sealer, CONTEXT, page(SMALL))), SMALL)


def test_no_key_and_nonce_come_twice_also_when_the_same_page_is_sealed_again() -> None:
    ring = Ring()
    layers = page(SMALL)
    for _ in range(3):  # a crash loses all that a sealer remembers
        sealer = FrameSealer(ring)
        frames = [bytes(sealed(sealer, CONTEXT, layers)) for _ in range(1000)]
        assert len(set(frames)) == len(frames)
    assert len(set(ring.granted)) == len({key for key, _ in ring.granted}) == 3000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_key_and_nonce_come_twice_in_a_million_pages() -> None:
    ring, layers = Ring(), page((16,))
    for _ in range(100):
        sealer = FrameSealer(ring)
        for _ in range(10_000):
            sealed(sealer, CONTEXT, layers)
        ring.given.clear()
    assert len({key for key, _ in ring.granted}) == 1_000_000


def test_names_say_nothing_and_differ_by_owner() -> None:
    sealer = FrameSealer(Ring())
    name = sealer.name_of(CONTEXT)
    assert name is not None
    assert len(name) == NAME_BYTES
    assert name == sealer.name_of(CONTEXT) != sealer.name_of(replace(CONTEXT, owner="rival"))
    assert sealer.name_of(replace(CONTEXT, owner="nobody")) is None
    shelves = {sealer.shelf_of(owner) for owner in ("acme", "rival", PUBLIC_OWNER)}
    assert {len(shelf or b"") for shelf in shelves} == {SHELF_BYTES}
    assert len(shelves) == 3
    assert FrameSealer(Ring(shelf=None)).shelf_of("acme") is None


def test_public_pages_are_sealed_by_keys_of_their_own() -> None:
    ring = Ring()
    sealer, layers = FrameSealer(ring), page(SMALL)
    public = replace(CONTEXT, owner=PUBLIC_OWNER, tag=PageTag(PUBLIC_SCOPE))
    frame = sealed(sealer, public, layers)
    page_id = bytes(frame[8:24])
    key = ring.key(1, PUBLIC_OWNER)
    suite = suite_of(Path("/proc/cpuinfo"))
    assert bytes(frame) == reference.seal(key, page_id, 1, 0, suite, public, layers)
    assert opened(sealer, public, frame, SMALL) == layers


def test_sealers_of_several_threads_do_not_disturb_each_other() -> None:
    sealer, failed = FrameSealer(Ring()), []

    def work() -> None:
        layers = page((500,) * 20)
        for _ in range(30):
            frame = sealed(sealer, CONTEXT, layers)
            if opened(sealer, CONTEXT, frame, (500,) * 20) != layers:
                failed.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_the_cipher_follows_the_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu aes vaes\n")
    assert suite_of(info) is Suite.AES_256_GCM
    info.write_text("Features\t: fp asimd\n")
    assert suite_of(info) is Suite.CHACHA20_POLY1305
    assert suite_of(tmp_path / "none") is Suite.AES_256_GCM
    assert FrameSealer(Ring(), Suite.CHACHA20_POLY1305).name == "chacha20-poly1305"


@pytest.mark.parametrize("sizes", [SMALL, MIXED])
def test_memory_that_is_given_is_used(sizes: Sequence[int]) -> None:
    sealer, layers = FrameSealer(Ring()), page(sizes)
    room = memoryview(bytearray(sealer.frame_bytes(sizes)))
    back = memoryview(bytearray(b"x" * sum(sizes)))
    frame = sealer.seal(CONTEXT, b"".join(layers), sizes, room)
    assert frame is room
    assert layers_of(sealer.open(CONTEXT, frame, sizes, back), sizes) == layers
    assert back == b"".join(layers)
    frame[-1] ^= 1
    with pytest.raises(SealError):
        list(sealer.open(CONTEXT, frame, sizes, back))
    last = SLICE_BYTES if sizes is MIXED else sum(sizes)
    assert back[-last:] == bytes(last), "what was not proven is zeroed"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_nothing_of_a_layer_is_left_where_one_of_its_slices_was_changed(number: int) -> None:
    sizes = (40, 2 * SLICE_BYTES + 9)
    sealer, layers = FrameSealer(Ring()), page(sizes)
    frame = sealed(sealer, CONTEXT, layers)
    frame[HEADER_BYTES + 40 + TAG_BYTES + number * (SLICE_BYTES + TAG_BYTES)] ^= 1
    back = memoryview(bytearray(b"x" * sum(sizes)))
    coming = sealer.open(CONTEXT, frame, sizes, back)
    assert next(coming) == layers[0]
    with pytest.raises(SealError, match="changed"):
        next(coming)
    zeroed = min((number + 1) * SLICE_BYTES, sizes[1])
    assert back[40 : 40 + zeroed] == bytes(zeroed), "opened, and zeroed again"
    assert back[40 + zeroed :] == b"x" * (sizes[1] - zeroed), "never written"


def test_a_reader_is_told_that_its_owner_seals_under_a_newer_key() -> None:
    ring = Ring()
    sealer, sizes = FrameSealer(ring), [4, 4]
    frame = sealer.seal(CONTEXT, b"12345678", sizes)

    def is_old() -> bool:
        layers = sealer.open(CONTEXT, frame, sizes)
        while True:
            try:
                next(layers)
            except StopIteration as end:
                return bool(end.value)

    assert not is_old()
    ring.newest = 2
    assert is_old()
