"""Rules that change while a node runs: what others than those in force cleared is dropped."""

from __future__ import annotations

import logging

import pytest

from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.promotion import Promotion
from kvkeep.types import EpochDelta
from tests.sharing.nodes import SIX, Blocks, end_epochs, readers
from tests.sharing.worlds import TAINT, Setting


class Changing:
    """An inspector that clears everything until its rules change."""

    def __init__(self) -> None:
        self.version = "before"

    def first_doubt(self, text: str) -> int | None:
        found = text.find(chr(0x4E00 + TAINT)) if self.version == "after" else -1
        return None if found < 0 else found


def changing(**limits: int) -> tuple[Setting, Changing, Promotion]:
    setting, inspector = Setting(), Changing()
    setting.inspector = inspector  # type: ignore[assignment]
    setting.directory.set({name: Member(name, "all") for name in SIX})
    return setting, inspector, setting.promotion(AtLeast(4, life_epochs=10), **limits)


def offer_all(policy: Promotion, *blocks: int) -> None:
    for name in SIX:
        policy.offer(Blocks(*blocks), name)


def test_what_was_public_is_private_from_the_end_of_the_epoch_in_which_rules_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, inspector, policy = changing()
    offer_all(policy, 1, TAINT)
    end_epochs(policy, 2)
    inspector.version = "after"
    assert readers(policy, Blocks(1, TAINT), "a") == {"a": 2}, "an epoch's snapshot is fixed"
    with caplog.at_level(logging.WARNING):
        delta = end_epochs(policy)
    assert delta == EpochDelta(3, (), tuple(Blocks(1, TAINT)))
    assert "rules changed" in caplog.text
    for name in "abc":
        policy.offer(Blocks(1, TAINT), name)
    end_epochs(policy, 2)
    assert policy.public_units == 0, "votes under other rules count no more"
    policy.offer(Blocks(1, TAINT), "d")
    end_epochs(policy, 2)
    assert readers(policy, Blocks(1, TAINT), "af") == {"a": 0, "f": 1}
    assert end_epochs(policy, 1).withdrawn == ()


def test_what_was_offered_before_the_change_is_read_by_nobody() -> None:
    _, inspector, policy = changing()
    offer_all(policy, 1)
    end_epochs(policy)
    offer_all(policy, 2)
    inspector.version = "after"
    assert end_epochs(policy, 3) == EpochDelta(4, (), ())
    offer_all(policy, 1)
    end_epochs(policy, 2)
    assert policy.public_units == 1


def test_a_taint_of_former_rules_is_none_of_the_present_ones() -> None:
    _, inspector, policy = changing()
    inspector.version = "after"
    end_epochs(policy)
    offer_all(policy, TAINT)
    end_epochs(policy, 2)
    inspector.version = "before"
    end_epochs(policy)
    offer_all(policy, TAINT)
    end_epochs(policy, 2)
    assert policy.public_units == 1


def test_new_rules_bring_no_new_votes_for_the_day() -> None:
    _, inspector, policy = changing(units_per_day=1)
    offer_all(policy, 1)
    end_epochs(policy, 2)
    inspector.version = "after"
    end_epochs(policy)
    offer_all(policy, 2)
    offer_all(policy, 1)
    end_epochs(policy, 2)
    assert policy.public_len(Blocks(1), "a") == 1, "cast already, cleared anew"
    assert policy.public_len(Blocks(2), "a") == 0


def test_a_change_at_a_restart_is_as_a_change_in_between() -> None:
    setting, inspector, policy = changing(units_per_day=1)
    offer_all(policy, 1)
    end_epochs(policy, 2)
    inspector.version = "after"
    again = setting.promotion(AtLeast(4, life_epochs=10), units_per_day=1)
    assert (again.epoch, again.public_units) == (policy.epoch, 0)
    offer_all(again, 2)
    end_epochs(again, 2)
    assert again.public_units == 0, "the day's vote was cast"
