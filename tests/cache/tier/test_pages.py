from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvkeep.cache.accounts import Retention
from kvkeep.cache.tier.frames import Place
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.types import PageTag
from tests.cache.tier.rigs import (
    FRAME,
    KINDS,
    MIB,
    RECORD,
    SHARES,
    SIZES,
    Rig,
    layers_of,
    page,
    write_layers,
)


def test_pages_come_back(rig: Rig) -> None:
    pages = [page(i) for i in range(8)]
    rig.store(*pages)
    assert rig.held(pages) == list(range(8)), "what is not yet written is found too"
    assert rig.fetch(pages[7]) == layers_of(pages[7])
    rig.settle()
    assert [rig.fetch(context) for context in pages] == [layers_of(c) for c in pages]
    assert not rig.tier.holds(page(99))
    assert rig.fetch(page(99)) is None
    assert sum(use.hits for use in rig.tier.uses()) == 9


def test_a_page_is_another_to_everything_that_it_is_bound_to(rig: Rig) -> None:
    rig.store(page(1))
    for other in (
        page(1, "b"),
        replace(page(1), tag=PageTag("a", codec="k2v2")),
        replace(page(1), model_digest=b"n" * 32),
        replace(page(1), spec_digest=b"t" * 16),
    ):
        assert not rig.tier.holds(other)


def test_a_page_is_copied_once(rig: Rig) -> None:
    reads: list[int] = []

    def read(into: memoryview) -> None:
        reads.append(len(into))
        into[:] = b"".join(layers_of(page(1)))

    copy = rig.tier.store(page(1), SIZES, read, None)
    assert copy is not None
    assert rig.tier.store(page(1), SIZES, read, None) is None
    assert not rig.tier.holds(page(1)), "its bytes are not there yet"
    assert copy.take(last=False)
    rig.settle()
    assert rig.tier.store(page(1), SIZES, read, None) is None
    assert reads == [sum(SIZES)]


def test_a_cancelled_copy_leaves_nothing(rig: Rig) -> None:
    copy = rig.tier.store(page(1), SIZES, partial(write_layers, page(1)), None)
    assert copy is not None
    copy.cancel()
    assert copy.take(last=True)
    assert [use.pages for use in rig.tier.uses()] == [0] * len(rig.tier.uses())


def test_pages_of_the_disk_outlive_a_restart(rig: Rig) -> None:
    pages = [page(i) for i in range(5)] + [page(i, "b") for i in range(5)]
    rig.store(*pages)
    rig.settle()
    rig.restart()
    expected = list(range(10)) if rig.sizes.disk_bytes else []
    assert rig.held(pages) == expected
    for i in expected:
        assert rig.fetch(pages[i]) == layers_of(pages[i])


def test_each_owner_has_its_own_room() -> None:
    rig = Rig(TierSizes(memory_bytes=20 * FRAME), shares={"a": 0.5, "b": 0.25})
    own, others = [page(i) for i in range(14)], [page(i, "b") for i in range(5)]
    rig.store(*others, *own[:10])
    assert rig.fetch(own[0]) is not None
    rig.store(*own[10:])
    assert rig.held(others) == list(range(5))
    assert rig.held(own) == [0, *range(5, 14)]
    rig.tier.set_shares({"a": 0.1, "b": 0.25}, {})
    assert rig.held(own) == [12, 13]
    rig.tier.close(5.0)


def test_what_is_pushed_out_of_memory_is_still_on_the_disk() -> None:
    rig = Rig(TierSizes(4 * FRAME, MIB), shares={"a": 0.5})
    pages = [page(i) for i in range(6)]
    rig.store(*pages)
    rig.settle()
    assert (rig.use("memory").pages, rig.use().pages) == (2, 6)
    assert [rig.fetch(context) for context in pages] == [layers_of(c) for c in pages]
    assert rig.use().hits + rig.use("memory").hits == 6
    assert rig.fetch(pages[5]) is not None
    assert rig.use("memory").hits >= 1, "what was read stays in memory"
    rig.tier.close(5.0)


@pytest.mark.parametrize("kind", ["disk", "both"])
def test_terms_say_how_far_down_pages_go(kind: str) -> None:
    rig = Rig(KINDS[kind], terms={"a": Retention(to_disk=False), "b": Retention(to_tier=False)})
    rig.store(page(1), page(1, "b"))
    rig.settle()
    assert rig.held([page(1), page(1, "b")]) == ([0] if kind == "both" else [])
    assert rig.use().pages == 0
    assert not any(layers_of(page(1))[0] in data for data in rig.disk.files.values())
    rig.tier.close(5.0)


def test_other_terms_take_pages_back_from_the_disk(disk: Rig) -> None:
    disk.store(page(1), page(2, "b"))
    disk.settle()
    disk.tier.set_shares(SHARES, {"a": Retention(to_disk=False)})
    assert disk.held([page(1), page(2, "b")]) == [1]
    disk.restart()
    assert disk.held([page(1), page(2, "b")]) == [1]


def test_a_forgotten_owner_has_no_page_left(rig: Rig) -> None:
    mine, others = [page(i) for i in range(5)], [page(i, "b") for i in range(3)]
    rig.store(*mine[:3], *others)
    rig.settle()
    rig.store(*mine[3:])
    assert rig.tier.forget("a") == 5
    assert rig.held(mine + others) == [5, 6, 7]
    rig.settle()
    stored = b"".join(rig.disk.files.values())
    assert not any(layers_of(context)[0] in stored for context in mine)
    rig.restart()
    assert rig.held(mine) == []
    assert rig.held(others) == (list(range(3)) if rig.sizes.disk_bytes else [])


def test_pages_go_when_their_time_is_over(rig: Rig) -> None:
    pages = [page(i) for i in range(3)]
    rig.store(pages[0], expires_s=1500.0)
    rig.store(pages[1], expires_s=1500.0)
    rig.store(pages[2])
    rig.settle()
    rig.store(pages[1], expires_s=2500.0)
    rig.now = 1600.0
    assert rig.held(pages) == [1, 2]
    rig.tier.end_epoch(1600.0)
    assert [use.pages for use in rig.tier.uses()] == [2] * len(rig.tier.uses())
    rig.now = 3000.0
    rig.settle()
    rig.restart()
    assert rig.held(pages) == ([2] if rig.sizes.disk_bytes else [])


def test_owners_that_are_no_more_lose_their_pages(disk: Rig) -> None:
    disk.store(page(1), page(1, "b"))
    disk.settle()
    disk.shares = {"b": 0.5}
    disk.restart()
    assert disk.use().pages == 1
    disk.tier.set_shares({}, {})
    assert disk.use().pages == 1, "before tenants are known nothing is given up"


def test_without_keys_pages_are_misses_and_nobody_loses_any(disk: Rig) -> None:
    disk.store(page(1))
    disk.settle()
    disk.sealer.away = True
    disk.store(page(2))
    disk.tier.set_shares({"b": 1.0}, {})
    assert disk.held([page(1), page(2)]) == []
    assert dict(disk.use().drops) == {"keys": 1}
    assert disk.tier.forget("a") == 0
    disk.sealer.away = False
    disk.tier.set_shares(SHARES, {})
    assert disk.held([page(1), page(2)]) == [0]


def test_pages_wait_for_the_keys_of_their_names(disk: Rig) -> None:
    disk.sealer.away = True
    copies = [
        disk.tier.store(page(i), SIZES, partial(write_layers, page(i)), None) for i in range(3)
    ]
    first, second, third = copies
    assert first is not None
    assert second is not None
    assert third is not None
    assert not first.take(last=False)
    assert second.take(last=True)
    third.cancel()
    disk.sealer.away = False
    assert first.take(last=False)
    disk.settle()
    assert disk.held([page(i) for i in range(3)]) == [0]
    assert dict(disk.use().drops) == {"keys": 1}


def test_quotas_are_named_once_keys_are_there(disk: Rig) -> None:
    disk.sealer.away = True
    disk.tier.set_shares({"c": 0.1, **SHARES}, {})
    disk.sealer.away = False
    disk.store(page(1, "c"))
    assert disk.held([page(1, "c")]) == []
    disk.tier.end_epoch(disk.now)
    disk.store(page(1, "c"))
    assert disk.held([page(1, "c")]) == [0]


def test_nothing_is_taken_or_found_while_it_sleeps(rig: Rig) -> None:
    rig.store(page(1))
    rig.tier.asleep = True
    rig.store(page(2))
    rig.tier.set_shares({"warm-up": 1.0}, {})
    assert rig.tier.forget("a") == 0
    assert rig.held([page(1), page(2)]) == []
    rig.tier.asleep = False
    assert rig.held([page(1), page(2)]) == [0]


def test_a_full_queue_puts_copies_off_and_loses_what_leaves_memory() -> None:
    rig = Rig(KINDS["disk"], shares={"a": 1e-9, "b": 0.5})
    rig.tier.set_shares({"a": 0.5, "b": 0.5}, {})
    rig.tier._queue_bytes = dict.fromkeys(rig.tier._queue_bytes, sum(SIZES))
    hold = rig.disk.during(lambda *_: time.sleep(0.05))
    with hold:
        copies = [
            rig.tier.store(page(i), SIZES, partial(write_layers, page(i)), None) for i in range(3)
        ]
        assert all(copies)
        taken = [copy.take(last=False) for copy in copies if copy is not None]
        assert taken == [True, False, False]
        last = copies[2]
        assert last is not None
        assert last.take(last=True)
        assert dict(rig.use().drops) == {"queue": 1}
        rig.store(page(1, "b"))
        assert rig.tier.holds(page(1, "b")), "another owner's queue is its own"
    rig.settle()
    second = copies[1]
    assert second is not None
    assert second.take(last=False)
    rig.settle()
    assert rig.held([page(i) for i in range(3)]) == [0, 1]
    rig.tier.close(5.0)


def test_pages_are_found_where_they_were_moved() -> None:
    rig = Rig(TierSizes(disk_bytes=64 * RECORD), shares={"a": 0.2, "b": 0.75})
    mine = [page(i) for i in range(8)]
    others = [page(i, "b") for i in range(400)]
    first: dict[bytes, Place] = {}
    for begin in range(0, 400, 10):
        rig.store(mine[begin // 10 % 8], *others[begin : begin + 10])
        rig.settle()
        for name, entry in rig.tier._index.entries.items():
            first.setdefault(name, entry.places["disk"])
    entries = rig.tier._index.entries
    moved = [name for name, entry in entries.items() if entry.places["disk"] != first[name]]
    assert moved, "segments that hold little were cleared away"
    kept = [context for context in mine + others if rig.tier.holds(context)]
    assert len(kept) > 30
    assert kept[:8] == mine
    assert [rig.fetch(context) for context in kept] == [layers_of(c) for c in kept]
    assert rig.use().errors == ()
    rig.restart()
    assert [context for context in mine + others if rig.tier.holds(context)] == kept
    rig.tier.close(5.0)


@pytest.mark.parametrize("again", [True, False])
def test_a_page_that_moves_while_it_is_fetched_is_read_where_it_is(
    disk: Rig, *, again: bool
) -> None:
    disk.store(page(1))
    disk.settle()
    (entry,) = disk.tier._index.entries.values()
    right = entry.places["disk"]
    entry.places["disk"] = right._replace(segment=right.segment + 99)
    found: dict[int, bytes | memoryview] = {}
    ended: list[bool] = []
    disk.tier.fetch(page(1), SIZES, found.__setitem__, ended.append)
    if again:
        entry.places["disk"] = right
    disk.until(lambda: bool(ended))
    assert ended == [again]
    assert (disk.use().misses, disk.use().pages) == ((0, 1) if again else (1, 0))
    assert b"".join(found.values()) == (b"".join(layers_of(page(1))) if again else b"")


Op = tuple[str, str, int]
OPS = st.lists(
    st.tuples(
        st.sampled_from("ab"), st.sampled_from(["store", "store", "fetch"]), st.integers(0, 12)
    ),
    max_size=40,
)


def seen(ops: list[Op], sizes: TierSizes) -> list[object]:
    """Return what owner a sees of these operations."""
    rig = Rig(sizes, shares={"a": 0.5, "b": 0.5})
    found: list[object] = []
    for owner, what, number in ops:
        context = page(number, owner)
        if what == "store":
            rig.store(context)
        elif owner == "a":
            found.append(rig.fetch(context) is not None)
        else:
            rig.tier.fetch(context, SIZES, lambda *_: None, lambda _: None)
        if owner == "a":
            found.append(rig.held([page(i) for i in range(13)]))
    rig.tier.close(5.0)
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(OPS, st.sampled_from([TierSizes(8 * FRAME), TierSizes(4 * FRAME, 16 * RECORD)]))
def test_an_owner_sees_its_own_operations_only(ops: list[Op], sizes: TierSizes) -> None:
    assert seen(ops, sizes) == seen([op for op in ops if op[0] == "a"], sizes)
