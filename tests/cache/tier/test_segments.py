from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvkeep.cache.tier.frames import Moved, Place
from kvkeep.cache.tier.records import BadRecord, record_bytes
from kvkeep.cache.tier.segments import Segments, segment_bytes
from tests.cache.tier.disks import Disk, Killed, failing, killed_at

LIMIT = 64 << 10
FRAME_BYTES = 1000
SHELVES = [bytes([65 + i]) * 16 for i in range(3)]


def name_of(page: int) -> bytes:
    return page.to_bytes(24, "big")


def shelf_of(page: int) -> bytes:
    return SHELVES[page % len(SHELVES)]


def frame_of(page: int, version: int) -> bytes:
    return (f"{page}.{version}.".encode() * FRAME_BYTES)[:FRAME_BYTES]


@dataclass
class Log:
    """Segments on a disk, and what a reader may expect of them."""

    disk: Disk = field(default_factory=Disk)
    limit: int = LIMIT
    places: dict[int, Place] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    lost: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.segments = Segments(self.disk, self.limit, self._moved)
        self.found = self.segments.open(0.0)

    def _moved(self, name: bytes, place: Place | None, seq: int) -> None:
        page = int.from_bytes(name, "big")
        if page in self.places and self.places[page].seq == seq:
            if place is None:
                self.lost.add(name)
                del self.places[page]
            else:
                self.places[page] = place

    def write(self, page: int, *, expires_s: float = 0.0) -> None:
        self.versions[page] = self.versions.get(page, -1) + 1
        frame = frame_of(page, self.versions[page])
        self.places[page] = self.segments.append(name_of(page), shelf_of(page), expires_s, frame)

    def drop(self, page: int) -> None:
        self.segments.drop(name_of(page), self.places.pop(page).seq)

    def purge(self, shelf: bytes) -> int:
        self.places = {page: at for page, at in self.places.items() if shelf_of(page) != shelf}
        return self.segments.purge(shelf)

    def check(self) -> None:
        for page, place in self.places.items():
            frame = self.segments.read(name_of(page), place)
            assert frame == frame_of(page, self.versions[page])
        files = sum(len(data) for data in self.disk.files.values())
        assert files == self.segments.total_bytes <= self.limit


def reopened(log: Log) -> Log:
    again = Log(log.disk, log.limit)
    pages = {int.from_bytes(one.name, "big"): one for one in again.found}
    assert all(one.shelf == shelf_of(page) for page, one in pages.items())
    again.places = {page: one.place for page, one in pages.items()}
    again.versions = dict(log.versions)
    return again


def test_pages_are_read_back_and_outlive_a_restart() -> None:
    log = Log()
    for page in range(20):
        log.write(page)
    log.check()
    again = reopened(log)
    again.check()
    assert list(again.places) == list(range(20)), "the oldest first"
    again.write(20)
    assert [*reopened(again).places] == list(range(21))


def test_what_was_dropped_stays_so() -> None:
    log = Log()
    for page in range(6):
        log.write(page)
    log.drop(2)
    log.write(3)
    again = reopened(log)
    again.check()
    assert set(again.places) == {0, 1, 3, 4, 5}
    with pytest.raises(BadRecord):
        again.segments.read(name_of(0), again.places[1])


def test_a_drop_means_one_write_only() -> None:
    log = Log()
    log.write(1)
    old = log.places[1]
    log.write(1)
    log.segments.drop(name_of(1), old.seq)
    log.check()
    assert set(reopened(log).places) == {1}


def test_room_is_made_where_much_has_gone() -> None:
    log = Log()
    live = 40  # of 64 KiB, with headers
    for page in range(400):
        log.write(page)
        if page >= live:
            log.drop(page - live)
        log.check()
    again = reopened(log)
    again.check()
    assert set(again.places) == set(range(400 - live, 400))
    assert sum(len(s.notes) for s in again.segments._segments.values()) <= 100, "notes go too"


def test_a_tier_full_of_pages_that_hold_takes_no_more() -> None:
    log = Log()
    with pytest.raises(OSError, match="full") as raised:
        play(log, [("write", page) for page in range(100)])
    assert raised.value.errno == errno.ENOSPC
    log.check()
    assert reopened(log).places.keys() == log.places.keys()


def test_a_purge_overwrites_every_copy() -> None:
    log = Log()
    for page in range(30):
        log.write(page)
    for page in (0, 3, 4):
        log.drop(page)
    gone = [page for page in range(30) if page % 3 == 0]
    assert log.purge(SHELVES[0]) == len(gone) - 2
    log.check()
    stored = b"".join(log.disk.files.values())
    assert not [page for page in gone if frame_of(page, 0)[:50] in stored]
    assert set(reopened(log).places) == set(log.places)


def test_what_a_purge_could_not_overwrite_is_overwritten_at_the_next_start() -> None:
    log = Log()
    for page in range(6):
        log.write(page)
    syncs = 1  # of the notes: they are durable, and nothing is overwritten yet
    with (
        log.disk.during(failing("sync", errno.EIO, first=syncs)),
        pytest.raises(OSError, match="EIO"),
    ):
        log.purge(SHELVES[0])
    with log.disk.during(killed_at(10**9)):
        again = reopened(log)
    assert set(again.places) == {1, 2, 4, 5}
    assert frame_of(0, 0)[:50] not in b"".join(log.disk.files.values())


def test_pages_whose_time_is_over_are_not_found() -> None:
    log = Log()
    log.write(1, expires_s=50.0)
    log.write(2, expires_s=150.0)
    log.write(3)
    again = Segments(log.disk, LIMIT)
    assert [one.name for one in again.open(100.0)] == [name_of(2), name_of(3)]


def churn(log: Log, pages: range) -> None:
    """Write pages and drop two of three at once, so that every segment is worth clearing."""
    for page in pages:
        log.write(page)
        if page % 3:
            log.drop(page)


def test_a_reader_whose_segment_has_gone_hears_so() -> None:
    log = Log()
    log.write(0)
    before = log.places[0]
    churn(log, range(1, 90))
    assert log.places[0] != before
    with pytest.raises(Moved):
        log.segments.read(name_of(0), before)
    log.check()


def test_a_bad_page_is_not_moved_on() -> None:
    log = Log()
    for page in range(3):
        log.write(page)
    name, data = next(iter(log.disk.files.items()))
    data[log.places[1].offset + 100] ^= 1
    log.drop(2)
    churn(log, range(10, 120))
    assert name not in log.disk.files
    assert log.lost == {name_of(1)}
    log.check()
    assert 0 in set(reopened(log).places) == set(log.places)


@pytest.mark.parametrize("most", [1, 17, 500])
def test_short_writes_are_taken_up_again(most: int) -> None:
    log = Log(Disk(most=most))
    for page in range(5):
        log.write(page)
    log.check()
    assert len(reopened(log).places) == 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("what", ["write", "sync", "open"])
def test_a_failed_write_changes_nothing(what: str, code: int) -> None:
    log = Log()
    for page in range(3):
        log.write(page)
    kept = dict(log.places)
    with log.disk.during(failing(what, code)):
        for page in range(3, 9):
            with suppress(OSError):
                log.write(page)
    assert kept.items() <= log.places.items()
    log.check()
    log.write(50)
    log.check()
    assert reopened(log).places.keys() == log.places.keys()


def test_a_segment_that_cannot_be_read_at_start_is_left_alone() -> None:
    log = Log()
    for page in range(12):
        log.write(page)
    with log.disk.during(failing("read", errno.EIO)):
        again = Log(log.disk)
    assert again.found == []
    assert again.segments.errors["segment"] == len(log.disk.files)
    again.write(99)
    assert {int.from_bytes(f.name, "big") for f in Log(log.disk).found} == {*range(12), 99}


Op = tuple[str, int]
OPS = st.lists(
    st.tuples(st.sampled_from(["write"] * 6 + ["drop"] * 3 + ["purge"]), st.integers(0, 30)),
    min_size=20,
    max_size=120,
)


def play(log: Log, ops: list[Op], after: Callable[[], None] = lambda: None) -> None:
    for what, page in ops:
        if what == "purge":
            log.purge(shelf_of(page))
        elif what == "drop" and page in log.places:
            log.drop(page)
        elif what == "write":
            log.write(page)
        after()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(OPS)
def test_any_operations_and_then_a_restart(ops: list[Op]) -> None:
    log = Log()
    play(log, ops, log.check)
    again = reopened(log)
    again.check()
    assert again.places.keys() == log.places.keys()


SCRIPT: list[Op] = [
    (what, page)
    for turn in range(16)
    for what, page in [
        *(("write", 7 * turn + i) for i in range(7)),
        *(("drop", 7 * turn - 20 + i) for i in range(6)),
        *([("purge", turn)] if turn in {4, 8, 12} else []),
        ("write", 7 * turn + 2),
    ]
]


def script_steps() -> int:
    log = Log(limit=48 << 10)
    with log.disk.during(killed_at(10**9)):
        play(log, SCRIPT)
    return log.disk.count


STEPS = script_steps()


def survives(number: int, *, power: bool) -> None:
    """End the process at one operation of the script, and check what a new one finds."""
    log = Log(limit=48 << 10)
    done: list[dict[int, Place]] = [{}]
    with log.disk.during(killed_at(number)), suppress(Killed):
        play(log, SCRIPT, lambda: done.append(dict(log.places)))
    if power:
        log.disk.lose_power()
    again = Log(log.disk, log.limit)
    versions = dict(log.versions)
    read = {}
    for one in again.found:
        page = int.from_bytes(one.name, "big")
        try:
            frame = bytes(again.segments.read(one.name, one.place))
        except BadRecord:
            assert power, "only what was not synced can be torn behind its header"
            continue
        allowed = [frame_of(page, v) for v in range(versions[page] + 1)]
        assert frame in allowed, "a page never has another's bytes"
        read[page] = frame
    if not power:
        whole = done[-1]
        step = len(done) - 1
        page_now = SCRIPT[step][1] if step < len(SCRIPT) else None
        purging = step < len(SCRIPT) and SCRIPT[step][0] == "purge"
        for page in whole:
            if page == page_now or (purging and shelf_of(page) == shelf_of(page_now or 0)):
                continue
            assert page in read, f"page {page} was written and is lost"
        for page in read:
            assert page in whole or page == page_now, f"page {page} had been dropped"
    again.write(1000)
    again.check()


@pytest.mark.parametrize("part", range(4))
def test_killed_at_any_operation(part: int) -> None:
    points = range(part, STEPS, 4 * 4)
    assert len(points) >= 25
    for number in points:
        survives(number, power=False)
        survives(number, power=True)


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True])
def test_killed_at_every_operation(power: bool) -> None:
    assert STEPS >= 500
    for number in range(STEPS):
        survives(number, power=power)


def test_the_size_of_segments_follows_the_tiers() -> None:
    assert segment_bytes(1 << 30) == 64 << 20
    assert segment_bytes(64 << 30) == 256 << 20
    assert segment_bytes(1 << 20) == 64 << 10
    assert record_bytes(0) == 76
