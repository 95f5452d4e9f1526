"""Pages of former key epochs are sealed anew when they are read, so that old keys can go."""

from __future__ import annotations

import errno
import os
import threading

from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.errors import KeysGone, KeysUnavailable
from kvkeep.shield import envelope
from kvkeep.shield.cipher import FrameSealer, PageKey, Pages
from kvkeep.shield.frame import epoch_of
from tests.cache.tier.disks import failing
from tests.cache.tier.rigs import KINDS, MIB, Rig, layers_of, page

PAGES = [page(number) for number in range(4)]


class Ring:
    """Epoch keys that a test rotates and destroys."""

    def __init__(self) -> None:
        self.epochs = {1: os.urandom(32)}
        self.away = False

    def name_key(self, owner: str) -> bytes | None:
        return owner.encode().ljust(32)

    def shelf_key(self) -> bytes | None:
        return bytes(32)

    def fresh(self, owner: str, page_id: bytes) -> PageKey:
        if self.away:
            raise KeysUnavailable("away")
        return self._made(max(self.epochs), page_id, 0)

    def known(self, owner: str, epoch: int, pages: Pages) -> list[PageKey]:
        if epoch not in self.epochs:
            raise KeysGone("retired")
        return [self._made(epoch, *page) for page in pages]

    def _made(self, epoch: int, page_id: bytes, generation: int) -> PageKey:
        material = envelope.page_material(self.epochs[epoch], page_id, generation)
        return PageKey(epoch, memoryview(bytearray(material)), max(self.epochs))

    def rotate(self) -> None:
        self.epochs[max(self.epochs) + 1] = os.urandom(32)


def rig_of(sizes: TierSizes) -> tuple[Rig, Ring]:
    ring = Ring()
    rig = Rig(sizes, real=FrameSealer(ring))
    rig.store(*PAGES)
    rig.settle()
    return rig, ring


def read(rig: Rig) -> None:
    for context in PAGES:
        assert rig.fetch(context) == layers_of(context)
    rig.settle()


def test_pages_that_were_read_outlive_the_key_they_were_sealed_under() -> None:
    for kind, sizes in KINDS.items():
        rig, ring = rig_of(sizes)
        read(rig)
        assert rig.tier.uses()[-1].renewed == 0, "nothing is old yet"
        ring.rotate()
        read(rig)
        assert rig.tier.uses()[-1].renewed == len(PAGES)
        del ring.epochs[1]
        read(rig)
        assert rig.tier.uses()[-1].renewed == len(PAGES), kind
        if sizes.disk_bytes:
            rig.restart()
            read(rig)
        rig.tier.close(5.0)


def test_pages_that_were_not_read_stay_under_their_old_key() -> None:
    rig, ring = rig_of(TierSizes(disk_bytes=MIB))
    ring.rotate()
    assert rig.fetch(PAGES[0]) is not None
    rig.settle()
    del ring.epochs[1]
    assert [rig.fetch(context) is not None for context in PAGES] == [True, False, False, False]
    rig.tier.close(5.0)


def test_a_page_that_cannot_be_sealed_anew_stays_as_it_was() -> None:
    for kind, sizes in KINDS.items():
        rig, ring = rig_of(sizes)
        ring.rotate()
        ring.away = True
        read(rig)
        assert rig.held(PAGES) == [0, 1, 2, 3], kind
        ring.away = False
        if sizes.disk_bytes:
            with rig.disk.during(failing("write", errno.EIO)):
                read(rig)
            assert rig.held(PAGES) == [0, 1, 2, 3], kind
            assert rig.use("disk").pages == len(PAGES), kind
            rig.restart()
        read(rig)
        rig.tier.close(5.0)


def test_a_page_that_goes_while_it_is_sealed_anew_is_gone() -> None:
    rig, ring = rig_of(TierSizes(disk_bytes=MIB))
    ring.rotate()
    assert rig.fetch(PAGES[0]) is not None
    assert rig.tier.forget("a") == len(PAGES)
    rig.settle()
    rig.restart()
    assert rig.held(PAGES) == []
    rig.tier.close(5.0)


def test_no_more_than_the_owners_share_of_the_queue_is_sealed_anew() -> None:
    rig, ring = rig_of(TierSizes(disk_bytes=MIB))
    ring.rotate()
    shelf, blocked = FrameSealer(ring).shelf_of("a"), threading.Event()
    assert shelf is not None
    rig.tier._queue_bytes = {shelf: 1500}

    def wait() -> None:
        assert blocked.wait(10)

    rig.tier._back.queue.put(shelf, 1000, wait)
    for context in PAGES:
        assert rig.fetch(context) == layers_of(context)
    assert rig.tier.uses()[-1].renewed == 0
    blocked.set()
    rig.settle()
    read(rig)
    assert rig.tier.uses()[-1].renewed > 0
    rig.tier.close(5.0)


def test_a_frame_names_its_epoch() -> None:
    rig, _ = rig_of(TierSizes(memory_bytes=MIB))
    frames = [entry.frame for entry in rig.tier._index.entries.values()]
    assert {epoch_of(bytes(frame)) for frame in frames if frame is not None} == {1}
    assert epoch_of(b"KVS1") is None
    assert epoch_of(bytes(64)) is None
    rig.tier.close(5.0)
