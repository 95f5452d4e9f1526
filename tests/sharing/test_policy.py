from __future__ import annotations

import pytest

from kvkeep.sharing.pins import Pins
from kvkeep.sharing.policies.pinned import SharePinned
from kvkeep.sharing.policies.salt import ShareBySalt
from kvkeep.sharing.policy import Access, ShareAll, ShareNothing, SharingPolicy
from tests.sharing.nodes import Blocks

CHAIN = Blocks(1, 2)


def pinned() -> SharePinned:
    pins = Pins()
    pins.add([CHAIN.hashes[0]])
    return SharePinned(pins)


@pytest.mark.parametrize(
    ("policy", "length", "at_once"),
    [
        (ShareNothing(), 0, False),
        (pinned(), 1, False),
        (ShareBySalt(), 2, True),
        (ShareAll(), 2, True),
    ],
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
    assert policy.forget("a") == 0
    assert policy.public_len(CHAIN, "a") == length
