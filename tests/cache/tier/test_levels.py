from __future__ import annotations

from kvkeep.cache.tier.levels import Level

A, B = b"a" * 16, b"b" * 16


def level(a: int = 30, b: int = 20) -> Level:
    made = Level("disk", 100)
    made.set_quotas({A: a, B: b})
    return made


def test_a_shelf_gives_up_its_own_oldest() -> None:
    some = level()
    for name in (b"1", b"2", b"3"):
        assert some.admit(A, name, 10) == []
    assert some.admit(B, b"1", 10) == []
    assert some.touch(A, b"1")
    assert some.admit(A, b"4", 15) == [b"2", b"3"]
    assert (some.names(A), some.names(B)) == ([b"1", b"4"], [b"1"])
    assert (some.used_bytes, some.pages) == (35, 3)


def test_what_cannot_fit_changes_nothing() -> None:
    some = level()
    some.admit(A, b"1", 10)
    assert some.admit(A, b"2", 31) is None
    assert some.admit(b"c" * 16, b"2", 1) is None, "a shelf without a quota holds nothing"
    assert some.names(A) == [b"1"]


def test_smaller_quotas_take_effect_at_once() -> None:
    some = level()
    for name in (b"1", b"2", b"3"):
        some.admit(A, name, 10)
    assert some.set_quotas({A: 15}) == [b"1", b"2"]
    assert some.set_quotas({A: 0}) == [b"3"]
    assert (some.shelves(), some.used_bytes) == ([], 0)


def test_a_page_is_there_once() -> None:
    some = level()
    some.add(A, b"1", 10)
    some.add(A, b"1", 20)
    assert (some.used_bytes, some.pages) == (20, 1)
    assert some.remove(A, b"1")
    assert not some.remove(A, b"1")
    assert not some.touch(A, b"1")
