"""Who may read what, when: one node's life from its first offer to its expiry."""

from __future__ import annotations

import numpy as np
import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.members import Directory, Member
from kvkeep.sharing.monitor import Monitor
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.scans import ScanLimits
from kvkeep.sharing.votes import PromotionLimits
from kvkeep.types import EpochDelta
from tests.sharing.nodes import SIX, Blocks, end_epochs, readers, sharing
from tests.sharing.worlds import TAINT, Finds, Setting


def test_offers_of_an_epoch_decide_at_the_end_of_the_next() -> None:
    _, policy = sharing()
    chain = Blocks(1, 2, 3)
    for name in "abcd":
        policy.offer(chain, name)
    assert end_epochs(policy).promoted == ()
    delta = end_epochs(policy)
    assert (delta.epoch, delta.promoted) == (2, tuple(chain))
    assert end_epochs(policy) == EpochDelta(3, tuple(chain), ())


def test_ones_own_vote_does_not_count_for_oneself() -> None:
    _, policy = sharing()
    chain = Blocks(1)
    for name in "abcd":
        policy.offer(chain, name)
    end_epochs(policy, 2)
    assert readers(policy, chain) == {"a": 0, "b": 0, "c": 0, "d": 0, "e": 1, "f": 1}
    policy.offer(chain, "e")
    end_epochs(policy, 2)
    assert set(readers(policy, chain).values()) == {1}


def test_fewer_than_k_share_nothing() -> None:
    _, policy = sharing()
    chain = Blocks(1)
    for _ in range(20):
        for name in "abc":
            policy.offer(chain, name)
    end_epochs(policy, 2)
    assert set(readers(policy, chain).values()) == {0}
    assert policy.public_units == 0
    assert policy.eps_per_day is None


def test_all_keys_children_and_subjects_of_one_tenant_are_one_voter() -> None:
    setting, policy = sharing()
    children = {f"gate/{i}": Member("gate", "all") for i in range(5)}
    setting.directory.set({"a": Member("a", "all"), **children})
    chain = Blocks(1)
    for name in children:
        policy.offer(chain, name)
    policy.offer(chain, "a")
    end_epochs(policy, 2)
    assert set(readers(policy, chain, ("a", "gate/0")).values()) == {0}
    assert policy.public_units == 0


@pytest.mark.parametrize(
    "alone",
    [None, Member("x", "others"), Member("x", "all", consume=False)],
    ids=["no group", "another group", "does not consume"],
)
def test_who_is_not_in_the_group_reads_nothing(alone: Member | None) -> None:
    setting, policy = sharing()
    members = {name: Member(name, "all") for name in SIX}
    setting.directory.set(members if alone is None else {**members, "x": alone})
    chain = Blocks(1)
    for name in SIX:
        policy.offer(chain, name)
    end_epochs(policy, 2)
    assert policy.public_len(chain, "a") == 1
    assert policy.public_len(chain, "x") == 0


def test_who_does_not_contribute_does_not_count() -> None:
    setting, policy = sharing()
    members = {name: Member(name, "all", contribute=name in "abc") for name in SIX}
    setting.directory.set(members)
    for name in SIX:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    assert policy.public_units == 0


def test_votes_in_two_groups_do_not_add_up() -> None:
    setting, policy = sharing()
    setting.directory.set({n: Member(n, "one" if n in "abc" else "two") for n in SIX})
    for name in SIX:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    assert policy.public_units == 0


def test_unconfirmed_content_expires_silently_and_withdraws_what_hangs_below() -> None:
    _, policy = sharing(life=4)
    long, short = Blocks(1, 2), Blocks(1)
    for name in SIX:
        policy.offer(long, name)
    end_epochs(policy, 2)
    for _ in range(4):
        for name in SIX:
            policy.offer(short, name)
        end_epochs(policy)
        assert policy.public_len(long, "a") in (1, 2)
    assert policy.public_len(long, "a") == 1, "confirmed again and again"
    delta = end_epochs(policy, 6)
    assert policy.public_len(long, "a") == 0
    assert delta.promoted == ()


def test_expiry_names_what_is_withdrawn() -> None:
    _, policy = sharing(life=2)
    for name in SIX:
        policy.offer(Blocks(1, 2), name)
    end_epochs(policy, 2)
    withdrawn = [end_epochs(policy).withdrawn for _ in range(4)]
    assert withdrawn.count(tuple(Blocks(1, 2))) == 1


def test_a_purged_tenants_votes_do_not_count_but_what_is_public_stays_its_time() -> None:
    _, policy = sharing(life=4)
    for name in "abcd":
        policy.offer(Blocks(1), name)
    for name in "abc":
        policy.offer(Blocks(2), name)
    end_epochs(policy, 2)
    assert policy.forget("a") == 2
    policy.offer(Blocks(2), "d")
    end_epochs(policy, 2)
    assert policy.public_len(Blocks(1), "f") == 1
    assert policy.public_len(Blocks(2), "f") == 0
    end_epochs(policy, 4)
    assert policy.public_len(Blocks(1), "f") == 0


def test_purging_drops_what_waits_for_its_scan() -> None:
    _, policy = sharing()
    for name in "abcd":
        policy.offer(Blocks(1), name)
    policy.forget("a")
    end_epochs(policy, 2)
    assert policy.public_units == 0


def test_a_taint_is_terminal_and_inherited_for_the_tenant_whose_text_it_is() -> None:
    _, policy = sharing()
    for name in SIX:
        policy.offer(Blocks(1, TAINT, 2), name)
    end_epochs(policy, 2)
    assert set(readers(policy, Blocks(1, TAINT, 2)).values()) == {1}
    for name in SIX:
        policy.offer(Blocks(1, TAINT, 3), name)
    end_epochs(policy, 2)
    assert policy.public_len(Blocks(1, TAINT, 3), "a") == 1


def test_a_conversation_behind_its_taint_is_read_no_more_and_still_vouches_above_it() -> None:
    _, policy = sharing(life=4)
    policy.offer(Blocks(1, TAINT), "a")
    end_epochs(policy, 2)
    read = policy.scans.counts.scanned_bytes["a"]
    for turn in range(8):
        policy.offer(Blocks(1, TAINT, *range(2, 3 + turn)), "a")
        policy.offer(Blocks(TAINT, turn), "b")
        end_epochs(policy)
    assert policy.scans.counts.scanned_bytes["a"] == read
    assert policy.scans.counts.scanned_bytes["b"] == 4 * 64 * 2 * 2, "until its taint was known"
    for name in "bcd":
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    assert policy.public_len(Blocks(1), "f") == 1


def test_above_a_taint_that_no_vote_reaches_only_that_is_read() -> None:
    _, policy = sharing(units_per_day=1)
    policy.offer(Blocks(9), "a")
    end_epochs(policy, 2)
    chain = Blocks(1, TAINT, 2, 3, 4)
    for units in (5, 2):
        before = policy.scans.counts.scanned_bytes["a"]
        policy.offer(chain, "a")
        end_epochs(policy, 2)
        assert policy.scans.counts.scanned_bytes["a"] - before == 4 * 64 * units


class LooksAhead(Finds):
    """Taints the page before the one where something is found."""

    def first_doubt(self, text: str) -> int | None:
        at = super().first_doubt(text)
        return None if at is None else at - 1


def test_one_tenants_taint_takes_nothing_from_others() -> None:
    setting = Setting(inspector=LooksAhead(TAINT))
    setting.directory.set({name: Member(name, "all") for name in SIX})
    policy = setting.promotion(AtLeast(4, life_epochs=10))
    for name in SIX:
        policy.offer(Blocks(1, 2), name)
    end_epochs(policy, 2)
    policy.offer(Blocks(1, 2, TAINT), "a")
    end_epochs(policy, 2)
    policy.offer(Blocks(1, 2), "a")
    end_epochs(policy, 2)
    assert set(readers(policy, Blocks(1, 2)).values()) == {2}, "five others still vouch"
    policy.forget("b")
    policy.offer(Blocks(1, 2), "c")
    end_epochs(policy, 2)
    assert policy.public_len(Blocks(1, 2), "c") == 1, "a's vote does not come back"
    assert policy.public_len(Blocks(1, 2), "b") == 2


def test_units_are_promoted_whole() -> None:
    _, policy = sharing(unit_pages=2)
    chain = Blocks(1, 2, 3)
    for name in SIX:
        policy.offer(chain, name)
        policy.offer(Blocks(7), name)
    assert end_epochs(policy, 2).promoted == tuple(chain)[:2]
    assert policy.public_len(chain, "a") == 2
    assert policy.public_len(Blocks(7), "a") == 0


def test_a_tenant_votes_for_no_more_than_its_bound_and_best_for_what_it_repeats() -> None:
    _, policy = sharing(units_per_day=8, k=2)
    for i in range(100):
        for name in "abc":
            policy.offer(Blocks(100 + i), name)
            policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    assert policy.public_units == 2, "a quarter of eight in one epoch"
    assert policy.public_len(Blocks(1), "f") == 1
    for epoch in range(10):
        for i in range(100):
            for name in "abc":
                policy.offer(Blocks(1000 * epoch + 1000 + i), name)
        end_epochs(policy)
    end_epochs(policy)
    assert policy.public_units <= 8


def test_planted_votes_cannot_fill_the_public_pool() -> None:
    _, policy = sharing(units_per_day=4, k=2)
    for i in range(50):
        policy.offer(Blocks(100 + i), "a")
        policy.offer(Blocks(100 + i), "b")
        end_epochs(policy)
    end_epochs(policy, 2)
    assert policy.public_units <= 4
    assert len(policy._votes.ledger.units) <= 8


def test_a_new_day_brings_a_new_bound() -> None:
    _setting, policy = sharing(units_per_day=1, k=2)
    for block in (1, 2):
        for name in "abc":
            policy.offer(Blocks(block), name)
    policy.end_epoch(60.0)
    policy.end_epoch(120.0)
    assert policy.public_units == 1
    policy.end_epoch(100_000.0)
    for name in "abc":
        policy.offer(Blocks(3), name)
    policy.end_epoch(100_060.0)
    policy.end_epoch(100_120.0)
    assert policy.public_len(Blocks(3), "f") == 1


def test_one_tenants_load_does_not_delay_or_drop_anothers_offers() -> None:
    setting = Setting()
    setting.directory.set({name: Member(name, "all") for name in (*SIX, "loud")})
    limits = {"scans": ScanLimits(queued_bytes=1024, epoch_bytes=1024)}
    policy = setting.promotion(AtLeast(4, life_epochs=10), **limits)  # type: ignore[arg-type]
    for i in range(500):
        policy.offer(Blocks(100 + i, 1, 2, 3), "loud")
    for name in "abcd":
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    assert policy.public_len(Blocks(1), "f") == 1
    assert policy.scans.counts.dropped == {"loud": 499}


def test_places_are_kept_and_new_units_follow_the_shallow_first() -> None:
    _, policy = sharing()
    for name in SIX:
        policy.offer(Blocks(9), name)
    assert end_epochs(policy, 2).promoted == tuple(Blocks(9))
    for name in SIX:
        policy.offer(Blocks(1, 2, 3), name)
        policy.offer(Blocks(5), name)
        policy.offer(Blocks(9), name)
    promoted = end_epochs(policy, 2).promoted
    assert promoted[0] == Blocks(9)[0]
    assert promoted.index(Blocks(5)[0]) < promoted.index(Blocks(1, 2)[1])


def test_state_crosses_a_restart() -> None:
    setting, policy = sharing()
    for name in "abc":
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    again = setting.promotion(AtLeast(4, life_epochs=10))
    assert again.epoch == policy.epoch
    again.offer(Blocks(1), "d")
    end_epochs(again, 2)
    assert again.public_len(Blocks(1), "f") == 1
    third = setting.promotion(AtLeast(4, life_epochs=10))
    assert third.public_len(Blocks(1), "f") == 1


@pytest.mark.parametrize("what", ["version", "unit", "bytes"])
def test_state_of_another_detector_unit_or_file_does_not_stand(what: str) -> None:
    setting, policy = sharing()
    for name in SIX:
        policy.offer(Blocks(1, 2), name)
    end_epochs(policy, 2)
    unit_pages = 2 if what == "unit" else 1
    if what == "version":
        setting.inspector = Finds(TAINT, version="fake-2")
    elif what == "bytes":
        setting.store.state = b"\xc1 torn"
    again = setting.promotion(AtLeast(4, life_epochs=10), unit_pages=unit_pages)
    assert again.public_len(Blocks(1, 2), "a") == 0


def test_the_state_holds_no_text_and_no_tokens() -> None:
    setting, policy = sharing(token=5000)
    for name in SIX:
        policy.offer(Blocks(31337), name)
    end_epochs(policy, 2)
    state = setting.store.state
    assert state is not None
    assert np.array([31337] * 4, "<i4").tobytes() not in state
    assert chr(0x4E00 + 31337).encode() not in state


def test_a_tenant_that_fell_back_reads_pins_alone() -> None:
    setting, policy = sharing()
    muted = Monitor(clock=lambda: 0.0)
    muted.falls_back = lambda tenant: tenant == "a"  # type: ignore[method-assign]
    setting.pins.add([Blocks(9)[0]])  # type: ignore[list-item]
    parts = policy._parts
    policy._parts = type(parts)(
        parts.rule,
        parts.directory,
        parts.decode,
        parts.inspector,
        parts.store,
        muted,
        parts.pins,
    )
    for name in SIX:
        policy.offer(Blocks(1), name)
        policy.offer(Blocks(9, 1), name)
    end_epochs(policy, 2)
    assert readers(policy, Blocks(1), ("a", "b")) == {"a": 0, "b": 1}
    assert readers(policy, Blocks(9, 1), ("a", "b")) == {"a": 1, "b": 2}


def test_pins_count_from_the_start() -> None:
    setting, policy = sharing()
    chain = Blocks(1, 2)
    setting.pins.add(chain.hashes[:1])
    assert readers(policy, chain, ("a", "nobody")) == {"a": 1, "nobody": 1}
    setting.pins.add(chain.hashes)
    assert policy.public_len(chain, "nobody") == 2


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: PromotionLimits(epoch_s=0), "share_epoch_s"),
        (lambda: PromotionLimits(units_per_day=0), "share_units_per_day"),
        (lambda: AtLeast(1), "share_k"),
        (lambda: AtLeast(4, life_epochs=1), "share_life_epochs"),
    ],
)
def test_settings_that_would_not_protect_are_refused(make: object, word: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=word):
        make()


def test_a_directory_knows_who_answers_for_whom() -> None:
    directory = Directory()
    directory.set({"gate/a": Member("gate", "g")})
    assert directory.voter("gate/a") == "gate"
    assert directory.voter("other") == "other"
