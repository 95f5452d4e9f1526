"""The published policy, its mistakes among it; `test_mistakes.py` holds that ours has none."""

from __future__ import annotations

from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.safekv import SafeKV
from kvkeep.types import Access
from tests.sharing import worlds as w
from tests.sharing.nodes import Blocks


def safekv(token: int = 5000) -> SafeKV:
    setting = w.Setting(inspector=w.Finds(token))
    return SafeKV(setting.directory, w.decode, setting.inspector)


def hit(policy: SafeKV, user: str, chain: Blocks) -> bool:
    length = policy.public_len(chain, user)
    served = tuple(chain.hashes[:length])
    policy.observe(Access(user, 0, 64 * len(chain), 0, served))
    return length == len(chain)


def test_what_the_detector_finds_is_its_creators_alone() -> None:
    policy = safekv(w.TAINT)
    policy.offer(Blocks(1, w.TAINT, 2), "alice")
    chain = Blocks(1, w.TAINT, 2)
    assert policy.public_len(chain, "alice") == 3
    assert policy.public_len(chain, "eve") == 1


def test_a_missed_secret_is_hit_until_its_budget_is_spent() -> None:
    policy = safekv()
    policy.offer(Blocks(1), "alice")
    assert sum(hit(policy, "eve", Blocks(1)) for _ in range(40)) == 10
    assert hit(policy, "alice", Blocks(1))


def test_the_probers_own_insert_refills_the_budget_for_ever() -> None:
    policy = safekv()
    policy.offer(Blocks(1), "alice")
    hits = 0
    for _ in range(40):
        hits += hit(policy, "eve", Blocks(1))
        policy.offer(Blocks(1), "eve")
    assert hits == 40


def test_foreign_hits_turn_a_shared_prefix_private_for_all() -> None:
    policy = safekv()
    policy.offer(Blocks(1), "alice")
    for i in range(10):
        hit(policy, f"eve{i}", Blocks(1))
    assert not hit(policy, "bob", Blocks(1))
    policy.offer(Blocks(1), "carol")
    assert not hit(policy, "bob", Blocks(1))


def test_several_creators_refill_a_pages_budget() -> None:
    policy = safekv()
    policy.offer(Blocks(1), "alice")
    policy.offer(Blocks(1), "bob")
    assert sum(hit(policy, "carol", Blocks(1)) for _ in range(40)) == 40


def test_a_leap_of_hits_per_user_throws_a_page_away() -> None:
    policy = safekv()
    policy.offer(Blocks(1), "alice")
    hit(policy, "alice", Blocks(1))
    assert policy.end_epoch(10.0).withdrawn == ()
    for _ in range(11):
        hit(policy, "alice", Blocks(1))
    assert policy.end_epoch(20.0).withdrawn == (Blocks(1).hashes[0],)
    assert not hit(policy, "alice", Blocks(1))


def test_a_quiet_window_is_no_leap() -> None:
    policy = safekv()
    policy.offer(Blocks(1), "alice")
    for _ in range(11):
        hit(policy, "alice", Blocks(1))
    assert policy.end_epoch(10.0).withdrawn == ()
    assert policy.end_epoch(20.0).withdrawn == ()


def test_forgetting_an_account_leaves_its_pages_to_nobody() -> None:
    policy = safekv(w.TAINT)
    policy.offer(Blocks(w.TAINT), "alice")
    assert policy.forget("alice") == 1
    assert policy.public_len(Blocks(w.TAINT), "alice") == 0


def test_members_read_by_their_own_account() -> None:
    setting = w.Setting()
    setting.directory.set({"gate/a": Member("gate", "g"), "gate/b": Member("gate", "g")})
    policy = SafeKV(setting.directory, w.decode, w.Finds(w.TAINT))
    policy.offer(Blocks(w.TAINT), "gate/a")
    assert policy.public_len(Blocks(w.TAINT), "gate/b") == 1
