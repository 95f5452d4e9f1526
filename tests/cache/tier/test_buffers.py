from __future__ import annotations

import time

from kvkeep.cache.tier.buffers import PREPARED, Buffers
from kvkeep.cache.tier.lowest import TierSizes
from tests.cache.tier.rigs import MIB, SIZES, Rig, layers_of, page


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
