"""The published policy, and the six mistakes published with it: here, and absent from ours."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvkeep.sharing.inspection import ClearsNothing, cleared_units
from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.safekv import SafeKV
from kvkeep.types import Access
from tests.cache.player import Player, prompt
from tests.sharing import worlds as w
from tests.sharing.nodes import SIX, Blocks, end_epochs, readers, sharing


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


# The six published mistakes must not happen with ours.


def opened(player: Player, account: str, tokens: list[int]) -> tuple[object, object]:
    player.open(account, f"{account}/0", tokens)
    player.end_views()
    note = player.seen[account][-4]
    assert isinstance(note, tuple)
    assert note[0] == "open"
    return note[1], note[2]


def player_of(make: w.Make = w.selective) -> Player:
    return w.World(make, ["alice", "eve"]).player


def test_a_second_tenants_insert_takes_nothing_from_the_first() -> None:
    player = player_of()
    player.open("alice", "alice/0", prompt(1, 2))
    player.end_views()
    player.open("eve", "eve/0", prompt(1, 3))
    player.end_views()
    match = player.manager.match(prompt(1, 2), account="alice", scope="alice/0")
    assert match.cached_tokens == 128


@pytest.mark.parametrize("wrong", [0, 30, 63])
def test_one_wrong_token_in_a_page_is_no_hit(wrong: int) -> None:
    player = player_of()
    tokens = prompt(*w.TEMPLATE)
    tokens[64 + wrong] += 1
    match = player.manager.match(tokens, account="eve", scope="eve/0")
    assert len(match.snapshot) == 1


def test_a_missed_secret_is_never_hit() -> None:
    player = player_of()
    player.open("alice", "alice/0", prompt(1, 2))
    player.end_views()
    for _ in range(40):
        match = player.manager.match(prompt(1, 2), account="eve", scope=f"eve/{_}")
        assert match.snapshot == ()
        player.manager.end_epoch(0.0)


def test_a_victim_and_the_attacker_are_no_crowd() -> None:
    _, policy = sharing()
    for _ in range(40):
        policy.offer(Blocks(1), "a")
        policy.offer(Blocks(1), "b")
        end_epochs(policy)
        assert set(readers(policy, Blocks(1)).values()) == {0}


def test_nobodys_hits_take_a_shared_prefix_from_others() -> None:
    _, policy = sharing()
    for name in SIX:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    for i in range(1000):
        policy.observe(Access("a", i, 64, 0, tuple(Blocks(1)), b"%d" % i, 1))
    assert readers(policy, Blocks(1)) == {"a": 0, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1}
    end_epochs(policy)
    assert policy.public_len(Blocks(1), "b") == 1


def test_without_an_identity_there_is_nothing_to_read() -> None:
    _, policy = sharing()
    for name in SIX:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    for nobody in ("", "none", "local"):
        assert policy.public_len(Blocks(1), nobody) == 0


def text_of(ids: Sequence[int]) -> str:
    return "".join("" if i == 1 else "\ufffd" if i == 2 else "benign text " for i in ids)


def test_empty_and_undecodable_text_clears_nothing_and_there_is_no_magic_word() -> None:
    tokens = Blocks(7, 1, 7).token_ids()
    assert cleared_units(tokens, 64, text_of, w.Finds()) == 1
    assert cleared_units(Blocks(7, 2, 7).token_ids(), 64, text_of, w.Finds()) == 1
    assert cleared_units(Blocks(1).token_ids(), 64, text_of, w.Finds()) == 0
    assert cleared_units(Blocks(7, 7).token_ids(), 64, text_of, w.Finds()) == 2
    for magic in ("Assistant", "<|im_end|>"):
        hides = cleared_units(
            Blocks(3, 4).token_ids(),
            64,
            lambda ids, word=magic: "".join(word if i == 3 else "secret" for i in ids),  # type: ignore[misc]
            Secret(),
        )
        assert hides == 1


class Secret:
    """Finds one word."""

    version = "secret"

    def first_doubt(self, text: str) -> int | None:
        at = text.find("secret")
        return None if at < 0 else at


def test_without_a_detector_nothing_is_cleared() -> None:
    assert cleared_units(Blocks(7).token_ids(), 64, text_of, ClearsNothing()) == 0


def test_members_read_by_their_own_account() -> None:
    setting = w.Setting()
    setting.directory.set({"gate/a": Member("gate", "g"), "gate/b": Member("gate", "g")})
    policy = SafeKV(setting.directory, w.decode, w.Finds(w.TAINT))
    policy.offer(Blocks(w.TAINT), "gate/a")
    assert policy.public_len(Blocks(w.TAINT), "gate/b") == 1
