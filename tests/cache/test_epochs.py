from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from kvkeep.cache.accounts import Retention
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.pool import TilePool
from kvkeep.cache.radix import Page, RadixIndex
from kvkeep.errors import ConfigError
from kvkeep.sharing.policy import Access, ShareNothing
from kvkeep.types import PUBLIC_SCOPE, EpochDelta, PageTag
from tests.cache.player import DIGEST, SPEC, Player, check, check_rows, make_manager, prompt
from tests.toys import DelayedTier, PromoteOffered

TOKENS = prompt(1, 2, 3, tail=9)


def warmed(public_pages: int = 4) -> tuple[CacheManager, Player]:
    manager = make_manager(24, PromoteOffered())
    manager.set_quotas({"a": 8, "b": 8}, public_pages)
    player = Player(manager)
    player.open("a", "a/1", TOKENS)
    player.release(player.running["a"][0], len(TOKENS))
    return manager, player


def test_what_is_promoted_is_read_by_others_from_the_next_epoch_on() -> None:
    manager, player = warmed()
    assert manager.match(TOKENS, account="b", scope="b/1").cached_tokens == 0
    assert len(manager.end_epoch(1.0).promoted) == 3
    check(manager)
    match = manager.match(TOKENS, account="b", scope="b/1")
    assert (len(match.snapshot), match.public, match.own, match.partial) == (3, (), (), None)
    assert match.cached_tokens == 0, "what others sent is not to be counted"
    free = manager.pool.free_pages
    view = manager.open_view(match, len(TOKENS))
    assert view.length == 192
    check_rows(manager, view, TOKENS)
    assert manager.used("b") == 3, "it is charged as if it had been computed"
    assert manager.pool.free_pages == free, "and takes no memory"
    manager.release(view, TOKENS[: view.length])
    assert manager.match(TOKENS, account="b", scope="b/1").cached_tokens == 192
    player.open("b", "b/1", prompt(1, 2, 3, 4, tail=2))
    player.release(player.running["b"][0], 258)
    match = manager.match(prompt(1, 2, 3, 4, tail=2), account="b", scope="b/1")
    assert (len(match.own), match.cached_tokens) == (4, 258)
    assert manager.used("b") == 5
    check(manager)


def test_own_pages_come_before_the_snapshot() -> None:
    manager, _ = warmed()
    manager.end_epoch(1.0)
    match = manager.match(TOKENS, account="a", scope="a/1")
    assert (match.snapshot, len(match.own), match.cached_tokens) == ((), 3, len(TOKENS))


def test_the_snapshot_goes_on_where_own_pages_end() -> None:
    manager, player = warmed()
    player.open("b", "b/1", prompt(1, tail=5))
    player.release(player.running["b"][0], 69)
    manager.end_epoch(1.0)
    match = manager.match(TOKENS, account="b", scope="b/1")
    assert (len(match.own), len(match.snapshot), match.cached_tokens) == (1, 2, 64)
    view = manager.open_view(match, len(TOKENS))
    assert view.length == 192
    check_rows(manager, view, TOKENS)
    manager.release(view, TOKENS[:192])
    check(manager)


def test_a_prompt_without_room_moves_nothing() -> None:
    manager, player = warmed()
    manager.end_epoch(1.0)
    manager.set_quotas({"a": 8, "b": 3}, 4)
    player.open("b", "b/1", prompt(7, tail=3))
    match = manager.match(TOKENS, account="b", scope="b/1")
    view = manager.open_view(match, len(TOKENS))
    assert (view.length, manager.used("b")) == (0, 2)
    manager.release(view, [])
    player.end()


def test_pinned_pages_are_counted_charged_to_nobody_and_continued() -> None:
    manager, player = warmed()
    manager.end_epoch(1.0)
    own = manager.match(TOKENS, account="a", scope="a/1").own
    for page in own[:2]:
        assert manager.promote(page, pinned=True) is not None
    match = manager.match(TOKENS, account="b", scope="b/1")
    assert (len(match.public), len(match.snapshot), match.cached_tokens) == (2, 1, 128)
    player.open("b", "b/1", TOKENS)
    assert manager.used("b") == 2
    player.release(player.running["b"][0], len(TOKENS))
    match = manager.match(TOKENS, account="b", scope="b/1")
    assert (len(match.public), len(match.own), match.cached_tokens) == (2, 1, len(TOKENS))
    manager.evict_pages("public", 9)
    match = manager.match(TOKENS, account="b", scope="b/1")
    assert (len(match.public), match.cached_tokens) == (2, len(TOKENS)), "pins are there for good"
    player.end()


def test_a_public_share_that_does_not_hold_the_pins_is_refused() -> None:
    manager, player = warmed()
    manager.end_epoch(1.0)
    for page in manager.match(TOKENS, account="a", scope="a/1").own:
        assert manager.promote(page, pinned=True) is not None
    manager.set_quotas({"a": 12}, 3)
    with pytest.raises(ConfigError, match="share_pinned: the prefixes take 3 pages"):
        manager.set_quotas({"a": 12}, 2)
    assert len(manager.match(TOKENS, account="b", scope="b/1").public) == 3
    player.end()


def test_no_public_sequence_makes_way_for_a_new_one() -> None:
    coded = replace(SPEC, window_tokens=128, first_extra_bytes=64)
    manager = make_manager(40, PromoteOffered(), spec=coded, num_first=8)
    manager.set_quotas({"a": 20}, 20)
    player = Player(manager)
    prompts = [prompt(10 * i, 10 * i + 1, tail=9) for i in range(1, 7)]
    found = []
    for i, tokens in enumerate(prompts):
        player.open("a", "a/1", tokens)
        player.release(player.running["a"][0], len(tokens))
        manager.end_epoch(float(i))
        readable = (manager.match(old, account="b", scope="b/1").snapshot for old in prompts)
        found.append([bool(pages) for pages in readable])
    for before, after in pairwise(found):
        assert all(now for was, now in zip(before, after, strict=True) if was)
    assert not all(found[-1]), "the share holds fewer sequences"
    player.end()


def test_nothing_public_is_evicted_for_what_does_not_fit() -> None:
    manager, player = warmed(public_pages=2)
    manager.end_epoch(1.0)
    before = set(manager.index.public_pages)
    assert len(before) == 2
    player.open("b", "b/1", prompt(5, 6))
    player.end_views()
    manager.end_epoch(2.0)
    assert set(manager.index.public_pages) == before
    manager.set_quotas({"a": 8, "b": 8}, 4)
    player.open("b", "b/1", prompt(5, 6))
    player.end_views()
    manager.end_epoch(3.0)
    assert len(manager.index.public_pages) == 4
    player.end()


def test_a_page_that_cannot_be_public_stays_private() -> None:
    manager, player = warmed(public_pages=1)
    own = manager.match(TOKENS, account="a", scope="a/1")
    assert own.partial is not None
    assert manager.promote(own.own[1]) is None
    assert manager.promote(own.partial[0]) is None
    first = manager.promote(own.own[0])
    assert first is not None
    assert manager.promote(own.own[0]) is first
    assert manager.promote(own.own[1]) is None, "its parent may not be evicted for it"
    check(manager)
    manager.evict_pages("a", 9)
    assert manager.promote(own.own[0]) is None
    player.end()


def test_a_page_of_another_codec_is_not_copied() -> None:
    manager = CacheManager(
        TilePool(SPEC, 4),
        RadixIndex(DIGEST),
        ShareNothing(),
        lambda scope: PageTag(scope, shield="none" if scope == PUBLIC_SCOPE else "own"),
    )
    manager.set_quotas({"a": 2}, 2)
    player = Player(manager)
    player.open("a", "a/1", prompt(1))
    page = manager.match(prompt(1), account="a", scope="a/1").own[0]
    assert manager.promote(page) is None


class Withdraws:
    """Promotes once, then withdraws the second page; shows tenant c nothing."""

    at_once = False
    by_scope = False

    def __init__(self) -> None:
        self.chain: tuple[bytes, ...] = ()
        self.seen: list[Access] = []
        self.forgotten: list[str] = []

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        return 0 if tenant == "c" else len(chain)

    def offer(self, chain: Sequence[bytes], tenant: str) -> None:
        self.chain = tuple(chain)

    def observe(self, access: Access) -> None:
        self.seen.append(access)

    def end_epoch(self, now: float) -> EpochDelta:
        if now == 1.0:
            return EpochDelta(1, promoted=self.chain)
        return EpochDelta(2, withdrawn=(self.chain[1], b"unknown"))

    def forget(self, tenant: str) -> int:
        self.forgotten.append(tenant)
        return 0


@pytest.mark.parametrize("held", [False, True])
def test_withdrawn_pages_go_at_once_or_with_their_last_view(held: bool) -> None:
    policy = Withdraws()
    manager = make_manager(24, policy)
    manager.set_quotas({"a": 8, "b": 8, "c": 2}, 4)
    player = Player(manager)
    player.open("a", "a/1", TOKENS)
    manager.end_epoch(1.0)
    assert manager.match(TOKENS, account="c", scope="c/1").cached_tokens == 0
    if held:
        player.open("b", "b/1", TOKENS)
        seen = replace(policy.seen[-1], branch=b"")
        assert seen == Access("b", 0, len(TOKENS), 0, policy.chain, node=policy.chain[-1])
    manager.end_epoch(2.0)
    check(manager)
    assert len(manager.match(TOKENS, account="b", scope="b/2").snapshot) == 1
    assert manager.used("public") == 1
    if held:
        check_rows(manager, player.running["b"][0].view, TOKENS)
        player.feed(player.running["b"][0], [7] * 80)
        player.release(player.running["b"][0], len(TOKENS) + 80)
        assert manager.used("b") == 5, "what was its own to use stays its own"
    assert manager.forget("a").pages == 3
    assert policy.forgotten == ["a"]
    assert isinstance(manager.match(TOKENS, account="a", scope="a/1").snapshot[0], Page)
    player.end()


def test_pinned_pages_are_not_withdrawn() -> None:
    policy = Withdraws()
    manager = make_manager(24, policy)
    manager.set_quotas({"a": 8, "b": 8}, 4)
    player = Player(manager)
    player.open("a", "a/1", TOKENS)
    for page in manager.match(TOKENS, account="a", scope="a/1").own:
        manager.promote(page, pinned=True)
    manager.end_epoch(1.0)
    manager.end_epoch(2.0)
    assert manager.used("public") == 3
    player.end()


def test_what_may_not_leave_memory_goes_to_no_tier() -> None:
    for to_tier in (True, False):
        tier = DelayedTier(polls=1)
        manager = make_manager(24, tier=tier)
        manager.set_quotas({"a": 8}, 0)
        manager.set_retention({"a": Retention(to_tier=to_tier)})
        player = Player(manager)
        player.open("a", "a/1", prompt(1, 2))
        player.end_views()
        manager.evict_pages("a", 9)
        assert bool(tier.kept) is to_tier


def test_unused_pages_go_when_their_time_is_over_and_used_ones_stay() -> None:
    manager = make_manager(24)
    manager.set_quotas({"a": 8, "b": 8}, 0)
    manager.set_retention({"a": Retention(ttl_s=100.0)})
    player = Player(manager)
    manager.end_epoch(1000.0)
    for account in ("a", "b"):
        player.open(account, f"{account}/1", prompt(1, 2))
        player.end_views()
    player.open("a", "a/1", prompt(3))
    manager.end_epoch(1090.0)
    assert (manager.used("a"), manager.used("b")) == (3, 2)
    manager.end_epoch(1100.0)
    assert (manager.used("a"), manager.used("b")) == (1, 2)
    check(manager)
    player.end()
