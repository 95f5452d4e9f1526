"""Memory, a disk and a service together: where pages are, and what happens where one fails."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.cache.tier import pages as module
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tiers import TierUse
from kvkeep.sealing import SealContext
from tests.cache.tier.disks import Disk, Service, failing
from tests.cache.tier.rigs import FRAME, MIB, RECORD, SHARES, Rig, layers_of, page

COMBINED = {
    "memory and service": TierSizes(MIB, 0, MIB),
    "disk and service": TierSizes(0, MIB, MIB),
    "all three": TierSizes(MIB, MIB, MIB),
}
SMALL = TierSizes(0, 8 * RECORD, MIB)
"""Of whose disk an owner with half of it may fill three records."""
PAGES = [page(number) for number in range(6)]


@dataclass
class Three:
    """A rig and its service."""

    sizes: TierSizes
    service: Service = field(default_factory=Service)
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    def __post_init__(self) -> None:
        self.rig = Rig(self.sizes, shares=self.shares, remote=lambda: self.service)

    def store(self, *pages: SealContext) -> None:
        self.rig.store(*pages)
        self.rig.settle()

    def use(self, tier: str) -> TierUse:
        return self.rig.use(tier)

    def right(self, *pages: SealContext) -> bool:
        found = [self.rig.fetch(context) for context in pages]
        self.rig.settle()
        return found == [layers_of(context) for context in pages]


@pytest.fixture(params=COMBINED)
def three(request: pytest.FixtureRequest) -> Iterator[Three]:
    made = Three(COMBINED[request.param])
    yield made
    made.rig.tier.close(5.0)


@pytest.fixture
def small() -> Iterator[Three]:
    made = Three(SMALL)
    yield made
    made.rig.tier.close(5.0)


def test_pages_come_back_after_a_restart_too(three: Three) -> None:
    three.store(*PAGES)
    assert three.use("remote").pages == len(PAGES) == len(three.service.kept)
    assert three.right(*PAGES)
    three.rig.restart()
    assert three.right(*PAGES)
    assert not any(use.misses or use.errors for use in three.rig.tier.uses())


def test_either_of_disk_and_service_is_enough_after_a_restart() -> None:
    three = Three(COMBINED["disk and service"])
    three.store(*PAGES)
    three.rig.disk = Disk()
    three.rig.restart()
    assert three.right(*PAGES)
    assert (three.use("remote").hits, three.use("disk").pages) == (6, 6)
    three.service.kept.clear()
    three.rig.restart()
    assert three.right(*PAGES)
    assert (three.use("disk").hits, three.use("remote").pages) == (6, 0)
    three.rig.tier.close(5.0)


def test_what_left_the_disk_comes_from_the_service_and_rises_again(small: Three) -> None:
    small.store(*PAGES)
    assert (small.use("disk").pages, small.use("remote").pages) == (3, 6)
    assert small.right(PAGES[0])
    assert small.right(PAGES[0])
    assert (small.use("remote").hits, small.use("disk").hits) == (1, 1)
    assert small.use("disk").pages == 3
    assert small.right(PAGES[3]), "the oldest made way for it"
    assert small.use("remote").hits == 2
    small.service.kept.clear()
    small.rig.restart()
    assert small.rig.held(PAGES) == [0, 3, 5]
    assert small.right(PAGES[0], PAGES[3], PAGES[5])


def test_what_finds_the_queue_full_does_not_rise(
    small: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.store(*PAGES)
    monkeypatch.setattr(module.TieredPages, "has_room", lambda *_: False)
    assert small.right(PAGES[0], PAGES[0])
    assert (small.use("remote").hits, small.use("disk").hits) == (2, 0)
    assert small.use("disk").pages == 3


def test_a_page_that_the_disk_has_lost_comes_from_the_service() -> None:
    three = Three(COMBINED["disk and service"])
    three.store(*PAGES[:2])
    (data,) = three.rig.disk.files.values()
    data[RECORD // 2] ^= 1
    assert three.right(*PAGES[:2])
    assert (three.use("disk").misses, three.use("disk").hits, three.use("remote").hits) == (1, 1, 1)
    assert (three.use("disk").pages, three.use("remote").pages) == (2, 2), "it rose again"
    assert three.right(PAGES[0])
    assert three.use("disk").hits == 2
    assert dict(three.use("remote").errors) == {"read:frame": 1}
    three.rig.tier.close(5.0)


def test_a_page_that_nobody_has_any_more_is_a_miss_once() -> None:
    three = Three(COMBINED["all three"])
    three.store(PAGES[0])
    three.rig.restart()
    (data,) = three.rig.disk.files.values()
    data[RECORD // 2] ^= 1
    three.service.kept.clear()
    assert three.rig.fetch(PAGES[0]) is None
    three.rig.settle()
    assert [(use.misses, use.pages, use.used_bytes) for use in three.rig.tier.uses()] == [
        (0, 0, 0),
        (1, 0, 0),
        (1, 0, 0),
    ]
    assert not three.rig.tier.holds(PAGES[0])
    three.store(PAGES[0])
    assert three.right(PAGES[0])
    three.rig.tier.close(5.0)


def test_a_service_that_is_away_costs_what_it_alone_has(small: Three) -> None:
    small.store(*PAGES)
    small.service.away = True
    assert [small.rig.fetch(one) is not None for one in PAGES] == [False] * 3 + [True] * 3
    small.rig.settle()
    assert small.rig.held(PAGES) == list(range(6)), "it may come back"
    small.service.away = False
    assert small.right(*PAGES)


@pytest.mark.parametrize("lost", ["disk", "remote"])
def test_a_level_that_takes_nothing_leaves_the_others(lost: str) -> None:
    three = Three(COMBINED["disk and service"])
    three.service.full = lost == "remote"
    if lost == "disk":
        three.rig.disk.plan = failing("write", errno.ENOSPC)
    three.store(*PAGES)
    assert three.right(*PAGES)
    kept = "remote" if lost == "disk" else "disk"
    assert three.use(kept).hits == len(PAGES)
    assert three.use(lost).pages == 0 or lost == "disk"
    assert dict(three.use("remote").errors)["write:ENOSPC"] >= len(PAGES)
    three.rig.tier.close(5.0)


def test_a_forgotten_owner_and_time_leave_nothing_anywhere(three: Three) -> None:
    three.store(*PAGES)
    three.rig.store(page(1, "b"), expires_s=2000.0)
    three.rig.settle()
    assert three.rig.tier.forget("a") == len(PAGES)
    three.rig.settle()
    assert len(three.service.kept) == 1
    three.rig.now = 2000.0
    three.rig.tier.end_epoch(2000.0)
    three.rig.settle()
    assert not three.service.kept
    assert all((use.pages, use.used_bytes) == (0, 0) for use in three.rig.tier.uses())
    three.rig.restart()
    assert three.rig.held([*PAGES, page(1, "b")]) == []


def test_a_page_that_was_given_up_while_it_rose_is_nowhere(small: Three) -> None:
    small.store(*PAGES)
    ended: list[bool] = []
    small.rig.tier.fetch(PAGES[0], (600, 400), lambda *_: None, ended.append)
    small.rig.until(lambda: bool(ended))
    small.rig.tier.set_shares({"b": 0.25}, {})
    small.rig.settle()
    small.rig.settle()
    assert [(use.pages, use.used_bytes) for use in small.rig.tier.uses()] == [(0, 0)] * 2
    small.rig.restart()
    assert small.rig.held(PAGES) == [], "with its share again"


Op = tuple[str, str, int]
OPS = st.lists(
    st.tuples(
        st.sampled_from("ab"), st.sampled_from(["store", "store", "fetch"]), st.integers(0, 12)
    ),
    max_size=40,
)


def seen(ops: list[Op]) -> list[object]:
    """Return what owner a sees of these operations: what it gets, from where, and what is held."""
    three = Three(TierSizes(4 * FRAME, 12 * RECORD, 16 * RECORD), shares={"a": 0.5, "b": 0.5})
    found: list[object] = []
    for owner, what, number in ops:
        context = page(number, owner)
        before = [use.hits for use in three.rig.tier.uses()]
        if what == "store":
            three.rig.store(context)
        else:
            got = three.rig.fetch(context)
            assert got in (None, layers_of(context))
            after = [use.hits for use in three.rig.tier.uses()]
            if owner == "a":
                found.append((got is not None, [b - a for a, b in zip(before, after, strict=True)]))
        three.rig.settle()
        if owner == "a":
            found.append(three.rig.held([page(i) for i in range(13)]))
    three.rig.tier.close(5.0)
    return found


@settings(max_examples=15, deadline=None, derandomize=True)
@given(OPS)
def test_an_owner_sees_its_own_operations_only(ops: list[Op]) -> None:
    assert seen(ops) == seen([op for op in ops if op[0] == "a"])
