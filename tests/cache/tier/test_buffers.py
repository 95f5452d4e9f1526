from __future__ import annotations

import time
from unittest.mock import patch

from kvkeep.cache.tier.buffers import PREPARED, Buffers
from kvkeep.cache.tier.frames import Place
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.segments import Segments
from kvkeep.cache.tiers import Install
from tests.cache.tier.rigs import FRAME, MIB, SIZES, Rig, layers_of, page


def test_memory_is_used_again_by_pages_of_its_size() -> None:
    buffers = Buffers(kept_bytes=25)
    first, second, third = (buffers.take(10) for _ in range(3))
    for buffer in (first, second, third):
        buffers.give_back(buffer)
    assert buffers.kept_bytes == 20, "no more than is to be kept"
    assert buffers.take(11) is not second
    assert {id(buffers.take(10)), id(buffers.take(10))} == {id(first), id(second)}
    assert buffers.kept_bytes == 0


def test_memory_is_made_before_it_is_needed() -> None:
    buffers = Buffers(kept_bytes=1000)
    assert [buffers.lacks(size) for size in (10, 10, 300, 2000)] == [PREPARED, 0, 3, 0]
    rig = Rig(TierSizes(disk_bytes=MIB))
    rig.store(page(1))
    rig.until(lambda: rig.tier._buffers.kept_bytes >= PREPARED * sum(SIZES))
    rig.tier.close(5.0)


def test_a_page_still_handed_out_keeps_its_memory() -> None:
    rig = Rig(TierSizes(disk_bytes=MIB))
    rig.store(page(1))
    end = time.monotonic() + 10
    while rig.tier._back.queue.busy:
        assert time.monotonic() < end
        time.sleep(0.001)
    found: dict[int, bytes] = {}

    def install(layer: int, data: bytes | memoryview) -> None:
        found[layer] = bytes(data)

    rig.tier.fetch(page(1), SIZES, install, lambda _: None)
    rig.tier._back.poll(1)
    assert list(found) == [0], "sealed by now, and half of it is on its way still"
    rig.store(page(2))
    rig.settle()
    assert [found[layer] for layer in (0, 1)] == layers_of(page(1))
    rig.tier.close(5.0)


def test_frames_from_the_disk_lie_in_memory_that_is_used_again() -> None:
    rig = Rig(TierSizes(disk_bytes=MIB))
    seen: list[memoryview | None] = []
    read = Segments.read

    def spied(
        self: Segments, name: bytes, place: Place, into: memoryview | None = None
    ) -> memoryview:
        seen.append(into)
        return read(self, name, place, into)

    rig.store(page(1), page(2))
    rig.settle()
    with patch.object(Segments, "read", spied):
        for number in (1, 2, 1):
            assert rig.fetch(page(number)) == layers_of(page(number))
    assert seen[0] is not None
    assert seen[1] is seen[0]
    assert seen[2] is seen[0]
    rig.tier.close(5.0)


def test_a_frame_that_memory_keeps_has_memory_of_its_own() -> None:
    rig = Rig(TierSizes(4 * FRAME, MIB), shares={"a": 0.5})
    pages = [page(number) for number in range(6)]
    rig.store(*pages)
    rig.settle()
    for number in (0, 1, 0, 1):
        assert rig.fetch(pages[number]) == layers_of(pages[number])
    assert rig.use("memory").hits == 2, "each stayed as it was read"
    rig.tier.close(5.0)


def test_many_pages_under_way_at_once_are_each_their_own() -> None:
    rig = Rig(TierSizes(disk_bytes=MIB))
    pages = [page(number) for number in range(24)]
    rig.store(*pages)
    rig.settle()
    found: dict[int, dict[int, bytes]] = {number: {} for number in range(24)}
    ended: list[bool] = []

    def installer(number: int) -> Install:
        def install(layer: int, data: bytes | memoryview) -> None:
            found[number][layer] = bytes(data)

        return install

    for number in reversed(range(24)):
        rig.tier.fetch(pages[number], SIZES, installer(number), ended.append)
    rig.until(lambda: len(ended) == len(pages))
    assert all(ended)
    for number, context in enumerate(pages):
        assert b"".join(found[number][layer] for layer in sorted(found[number])) == b"".join(
            layers_of(context)
        )
    rig.tier.close(5.0)
