from __future__ import annotations

import errno

import pytest

from kvkeep.cache.tier.records import HEADER_BYTES
from tests.cache.tier.disks import failing
from tests.cache.tier.rigs import RECORD, SIZES, Rig, layers_of, page


@pytest.mark.parametrize(
    "at", [0, 5, 7, 9, 13, 20, 45, 62, 70, HEADER_BYTES, HEADER_BYTES + 33, HEADER_BYTES + 500, -1]
)
def test_a_changed_byte_is_a_miss_and_the_page_can_be_stored_again(disk: Rig, at: int) -> None:
    disk.store(page(1), page(2))
    disk.settle()
    (data,) = disk.disk.files.values()
    data[at % RECORD] ^= 0x10
    assert disk.fetch(page(1)) is None
    assert disk.fetch(page(2)) == layers_of(page(2))
    assert disk.use().misses == 1
    assert sum(count for _, count in disk.use().errors) == 1
    assert not disk.tier.holds(page(1)), "it is not tried again"
    disk.store(page(1))
    disk.settle()
    assert disk.fetch(page(1)) == layers_of(page(1))


def test_swapped_records_are_misses(disk: Rig) -> None:
    disk.store(page(1), page(2, "b"))
    disk.settle()
    (data,) = disk.disk.files.values()
    data[:RECORD], data[RECORD:] = data[RECORD:], data[:RECORD]
    assert disk.fetch(page(1)) is None
    assert disk.fetch(page(2, "b")) is None
    assert dict(disk.use().errors) == {"read:swapped": 2}


def test_swapped_frames_are_misses_even_with_checksums_that_fit(disk: Rig) -> None:
    disk.store(page(1), page(2, "b"))
    disk.settle()
    segments = disk.tier._back._frames["disk"]
    name = disk.sealer.name_of(page(1))
    other = disk.sealer.seal(page(2, "b"), b"".join(layers_of(page(2, "b"))), SIZES)
    assert name is not None
    entry = disk.tier._index.entries[name]
    entry.places["disk"] = segments.append(name, entry.shelf, 0.0, other)
    assert disk.fetch(page(1)) is None
    assert dict(disk.use().errors) == {"read:sealed": 1}


def test_a_truncated_file_is_a_miss(disk: Rig) -> None:
    disk.store(page(1), page(2))
    disk.settle()
    (data,) = disk.disk.files.values()
    del data[RECORD + 40 :]
    assert disk.fetch(page(2)) is None
    assert disk.fetch(page(1)) == layers_of(page(1))
    disk.restart()
    assert disk.held([page(1), page(2)]) == [0]


@pytest.mark.parametrize(
    ("what", "code"), [("write", errno.ENOSPC), ("write", errno.EIO), ("open", errno.EMFILE)]
)
def test_a_failed_write_is_a_miss_and_service_goes_on(rig: Rig, what: str, code: int) -> None:
    if not rig.sizes.disk_bytes:
        return
    with rig.disk.during(failing(what, code)):
        rig.store(page(1))
        rig.settle()
    assert rig.tier.holds(page(1)) is bool(rig.sizes.memory_bytes)
    assert dict(rig.use().errors) == {f"write:{errno.errorcode[code]}": 1}
    rig.store(page(1), page(2))
    rig.settle()
    assert rig.held([page(1), page(2)]) == [0, 1]
    rig.restart()
    assert rig.held([page(1), page(2)]) == [0, 1]


def test_a_failed_read_is_a_miss(disk: Rig) -> None:
    disk.store(page(1))
    disk.settle()
    with disk.disk.during(failing("read", errno.EIO)):
        assert disk.fetch(page(1)) is None
    assert dict(disk.use().errors) == {"read:EIO": 1}


def test_a_page_whose_keys_are_away_is_a_miss_and_stays(rig: Rig) -> None:
    rig.store(page(1))
    rig.settle()
    rig.sealer.closed = True
    assert rig.fetch(page(1)) is None
    assert [error for use in rig.tier.uses() for error in use.errors] == [("read:keys", 1)]
    rig.sealer.closed = False
    assert rig.fetch(page(1)) == layers_of(page(1))
