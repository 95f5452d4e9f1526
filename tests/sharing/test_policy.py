from __future__ import annotations

import pytest

from kvkeep.sharing.policy import Access, ShareAll, ShareNothing, SharingPolicy

CHAIN = (b"1" * 32, b"2" * 32)


@pytest.mark.parametrize(
    ("policy", "length", "at_once"), [(ShareNothing(), 0, False), (ShareAll(), 2, True)]
)
def test_the_null_object_shares_nothing_and_the_baseline_everything(
    policy: SharingPolicy, length: int, at_once: bool
) -> None:
    policy.offer(CHAIN, "a")
    policy.observe(Access("a", 0, 128, 128, ()))
    assert policy.public_len(CHAIN, "b") == length
    assert policy.public_len((), "b") == 0
    assert policy.at_once is at_once
    delta = policy.end_epoch(1.0)
    assert (delta.promoted, delta.withdrawn) == ((), ())
    policy.forget("a")
    assert policy.public_len(CHAIN, "a") == length
