from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvkeep.cache.accounts import AccountUse
from kvkeep.cache.manager import CacheManager
from kvkeep.errors import ConfigError, EngineError, PoolExhausted, QuotaExceeded
from kvkeep.sharing.policy import ShareAll, SharingPolicy
from kvkeep.types import PAGE_TOKENS, PageKind, PageState
from tests.cache.player import SPEC, Player, check, check_rows, make_manager, prompt
from tests.toys import DelayedTier, PromoteOffered

TOKENS = prompt(1, 2, 3, tail=9)


@pytest.fixture
def manager() -> CacheManager:
    manager = make_manager(24)
    manager.set_quotas({"a": 8, "b": 8}, 2)
    return manager


@pytest.fixture
def player(manager: CacheManager) -> Player:
    return Player(manager)


def serve(player: Player, scope: str, tokens: list[int]) -> None:
    player.open(scope[0], scope, tokens)
    player.release(player.running[scope[0]][-1], len(tokens))


@pytest.mark.parametrize("tokens", [TOKENS, prompt(1, 2), prompt(tail=3)])
def test_a_prompt_wholly_cached_has_its_whole_length(player: Player, tokens: list[int]) -> None:
    serve(player, "a/1", tokens)
    match = player.manager.match(np.array(tokens, np.int32), account="a", scope="a/1")
    view = player.manager.open_view(match, len(tokens))
    assert match.cached_tokens == view.length == len(tokens)
    check_rows(player.manager, view, tokens)


def test_rows_of_a_page_that_diverges_are_copied_and_the_page_stays(player: Player) -> None:
    serve(player, "a/1", prompt(1, 2))
    other = prompt(1) + [2] * 40 + [8] * 30
    match = player.manager.match(other, account="a", scope="a/1")
    assert match.cached_tokens == PAGE_TOKENS + 40
    player.open("a", "a/1", other)
    view = player.manager.open_view(
        player.manager.match(prompt(1, 2), account="a", scope="a/1"), 128
    )
    check_rows(player.manager, view, prompt(1, 2))
    check(player.manager)


def coded_manager(policy: SharingPolicy | None = None) -> CacheManager:
    manager = make_manager(24, policy, spec=replace(SPEC, window_tokens=128))
    manager.set_quotas({"a": 8, "b": 8}, 8)
    return manager


def test_coded_pages_are_indexed_and_matched_in_whole_blocks() -> None:
    manager = coded_manager()
    serve(Player(manager), "a/1", TOKENS)
    assert manager.used("a") == 2, "neither the third page nor the rows after it can be found"
    match = manager.match(TOKENS, account="a", scope="a/1")
    assert match.cached_tokens == 128
    assert [page.state for page in match.own] == [PageState.ENCODED] * 2
    assert manager.match(prompt(1, 9, 9), account="a", scope="a/1").cached_tokens == 0
    assert manager.match(prompt(1, 2, 3)[:-65], account="a", scope="a/1").cached_tokens == 0
    assert [manager.findable_pages(n) for n in (127, 128, 255, 256)] == [0, 2, 2, 4]


def test_a_block_evicted_in_part_is_found_no_more() -> None:
    manager = coded_manager()
    serve(Player(manager), "a/1", prompt(1, 2, 3, 4))
    match = manager.match(prompt(1, 2, 3, 4), account="a", scope="a/1")
    assert match.cached_tokens == 256
    manager.evict_pages("a", 1)
    assert manager.open_view(match, 256).length == 128
    assert manager.match(prompt(1, 2, 3, 4), account="a", scope="a/1").cached_tokens == 128
    check(manager)


def test_blocks_of_public_and_own_pages_count_from_the_start_of_the_prompt() -> None:
    manager = coded_manager(PromoteOffered())
    player = Player(manager)
    serve(player, "a/1", prompt(1, 2, 3, 4))
    manager.end_epoch(0.0)
    match = manager.match(prompt(1, 2, 3, 4), account="b", scope="b/1")
    assert (match.cached_tokens, len(match.snapshot)) == (0, 4)
    match = manager.match(prompt(1, 2, 3, 9), account="b", scope="b/1")
    assert len(match.snapshot) == 2, "the third page alone is no block"
    player.open("b", "b/1", prompt(1, 2, 3, 9))
    assert manager.match(prompt(1, 2, 3, 9), account="b", scope="b/1").cached_tokens == 256
    check(manager)


def test_a_tiers_pages_are_fetched_in_whole_blocks() -> None:
    tier = DelayedTier(1)
    manager = make_manager(8, tier=tier, spec=replace(SPEC, window_tokens=128))
    manager.set_quotas({"a": 8}, 0)
    serve(Player(manager), "a/1", prompt(1, 2, 3, 4))
    manager.evict_pages("a", 4)
    tokens = np.array(prompt(1, 2, 3, 4), np.int32)
    assert len(manager.match(tokens, account="a", scope="a/1").pending) == 4
    tier.lose_first()
    match = manager.match(tokens, account="a", scope="a/1")
    assert len(match.pending) == 2
    fetch = manager.begin_fetch(match, tokens)
    assert fetch is not None
    manager.poll()
    manager.end_fetch(fetch)
    found = manager.match(tokens, account="a", scope="a/1")
    assert [page.state for page in found.own] == [PageState.ENCODED] * 2
    check(manager)


@pytest.mark.parametrize("scope", ["a/2", "b/1"])
def test_nothing_crosses_scopes(player: Player, scope: str) -> None:
    serve(player, "a/1", TOKENS)
    assert player.manager.match(TOKENS, account=scope[0], scope=scope).cached_tokens == 0


def test_the_same_scope_under_another_account_finds_nothing(player: Player) -> None:
    serve(player, "a/1", TOKENS)
    assert player.manager.match(TOKENS, account="b", scope="a/1").cached_tokens == 0


def test_a_request_may_not_name_the_public_scope(manager: CacheManager) -> None:
    with pytest.raises(ConfigError, match="scope"):
        manager.match(TOKENS, account="a", scope="public")


def test_pages_closed_while_decoding_are_indexed(player: Player) -> None:
    player.open("a", "a/1", prompt(1, tail=50))
    run = player.running["a"][0]
    assert run.view.num_pages == 2
    for token in range(30):
        player.feed(run, [token])
    match = player.manager.match(run.tokens, account="a", scope="a/1")
    assert len(match.own) == 2
    assert match.own[1].state is PageState.CLOSED


def test_equal_pages_of_two_views_are_kept_once(player: Player) -> None:
    for _ in range(2):
        player.open("a", "a/1", prompt(1))
    first, second = player.running["a"]
    for run in (first, second):
        player.feed(run, [4] * 70)
    assert first.view.pages()[:2].tolist() == second.view.pages()[:2].tolist()
    assert player.manager.used("a") == 4
    check(player.manager)


def test_a_longer_page_replaces_its_partial_leaf(player: Player) -> None:
    for tail in (5, 20, 9):
        serve(player, "a/1", prompt(1, tail=tail))
    assert player.manager.used("a") == 2
    serve(player, "a/1", prompt(1, tail=70))
    assert player.manager.used("a") == 3


def test_nothing_tainted_is_indexed(player: Player) -> None:
    player.open("a", "a/1", prompt(1))
    run = player.running["a"][0]
    run.view.taint(PAGE_TOKENS + 10)
    player.feed(run, [2] * 128)
    player.release(run, 192)
    assert player.manager.match([*prompt(1, 2)], account="a", scope="a/1").cached_tokens == 74
    check(player.manager)


def test_extend_takes_from_the_own_share_only_and_changes_nothing_where_it_fails(
    player: Player,
) -> None:
    manager = player.manager
    serve(player, "b/1", TOKENS)
    serve(player, "a/1", prompt(1, 2, 3, 4, 5, 6))
    player.open("a", "a/1", prompt(7, 8, 9))
    view = player.running["a"][0].view
    assert (manager.used("a"), manager.used("b"), manager.room("a")) == (8, 4, 5)
    assert manager.match(prompt(1, 2, 3, 4, 5, 6), account="a", scope="a/1").cached_tokens == 320
    with pytest.raises(QuotaExceeded, match="room for 5"):
        manager.extend(view, 6 * PAGE_TOKENS)
    assert (manager.used("a"), view.num_pages) == (8, 3)
    manager.extend(view, 5 * PAGE_TOKENS)
    assert (manager.used("a"), manager.used("b"), manager.room("a")) == (8, 4, 0)
    with pytest.raises(QuotaExceeded):
        manager.extend(view, 6 * PAGE_TOKENS)
    check_rows(manager, view, prompt(7, 8, 9))


def test_without_room_for_a_copy_the_rows_are_left_out(player: Player) -> None:
    serve(player, "a/1", TOKENS)
    player.manager.set_quotas({"a": 4}, 0)
    view = player.manager.open_view(
        player.manager.match(TOKENS, account="a", scope="a/1"), len(TOKENS)
    )
    assert view.length == 3 * PAGE_TOKENS
    player.manager.extend(view, 9)
    check(player.manager)


def test_a_match_that_was_evicted_since_opens_shorter(player: Player) -> None:
    serve(player, "a/1", TOKENS)
    match = player.manager.match(TOKENS, account="a", scope="a/1")
    player.manager.evict_pages("a", 1)
    assert player.manager.open_view(match, len(TOKENS)).length == 3 * PAGE_TOKENS
    match = player.manager.match(prompt(1, 2), account="a", scope="a/1")
    player.manager.evict_pages("a", 9)
    assert player.manager.open_view(match, 128).length == 128, "locked pages stay"


def test_a_fork_shares_full_pages_and_copies_the_open_one(player: Player) -> None:
    player.open("a", "a/1", prompt(1, 2, tail=5))
    run = player.running["a"][0]
    player.fork(run)
    twin = player.running["a"][1]
    assert twin.view.pages()[:2].tolist() == run.view.pages()[:2].tolist()
    assert twin.view.pages()[2] != run.view.pages()[2]
    assert player.manager.used("a") == 4
    player.feed(run, [1] * 10)
    player.feed(twin, [2] * 10)
    check_rows(player.manager, run.view, run.tokens)
    check_rows(player.manager, twin.view, twin.tokens)
    check(player.manager)


def test_a_forgotten_account_leaves_nothing_even_from_running_views(player: Player) -> None:
    serve(player, "a/2", TOKENS)
    player.open("a", "a/1", TOKENS)
    serve(player, "b/1", TOKENS)
    assert player.manager.forget("a").pages == 7
    check_rows(player.manager, player.running["a"][0].view, TOKENS)
    player.feed(player.running["a"][0], [3] * 70)
    player.release(player.running["a"][0], len(TOKENS) + 70)
    assert player.manager.used("a") == 0
    assert player.manager.used("b") == 4
    player.manager.set_quotas({"b": 8}, 0)
    assert set(player.manager.stats().accounts) == {"b", "public"}


def test_dropping_one_scope_keeps_the_others(player: Player) -> None:
    serve(player, "a/1", TOKENS)
    serve(player, "a/2", prompt(1, 2))
    assert player.manager.drop_scope("a", "a/1") == 4
    assert player.manager.used("a") == 2


def test_shares_must_fit_the_pool_and_be_sound(manager: CacheManager) -> None:
    for quotas, public, word in (
        ({"a": 20}, 5, "25 pages of a pool of 24"),
        ({"a": -1}, 0, "negative"),
        ({"public": 1}, 0, "public_pages"),
    ):
        with pytest.raises(ConfigError, match=word):
            manager.set_quotas(quotas, public)
    assert manager.fits("a", 8)
    assert not manager.fits("a", 9)
    assert not manager.fits("nobody", 0)
    assert manager.room("nobody") == manager.used("nobody") == 0


def test_a_share_that_shrinks_gives_up_unused_pages_at_once(player: Player) -> None:
    serve(player, "a/1", prompt(1, 2, 3))
    player.open("a", "a/1", prompt(4, 5))
    player.manager.set_quotas({"a": 1}, 0)
    assert (player.manager.used("a"), player.manager.room("a")) == (2, 0)
    player.manager.set_quotas({"b": 24}, 0)
    view = player.manager.open_view(player.manager.match([1], account="b", scope="b/1"), 1)
    with pytest.raises(PoolExhausted):
        player.manager.extend(view, 24 * PAGE_TOKENS)
    assert (player.manager.used("b"), view.num_pages) == (0, 0)
    player.release(player.running["a"][0], 128)
    assert player.manager.used("a") == 0
    player.manager.extend(view, 24 * PAGE_TOKENS)
    check(player.manager)


def test_an_account_without_a_share_gets_nothing(manager: CacheManager) -> None:
    view = manager.open_view(manager.match([1], account="c", scope="c/1"), 1)
    with pytest.raises(QuotaExceeded, match="no reserved share"):
        manager.extend(view, 1)


def test_misuse_of_views_is_an_error(player: Player) -> None:
    player.open("a", "a/1", TOKENS)
    view = player.running["a"][0].view
    with pytest.raises(EngineError, match="extend it first"):
        player.manager.commit(view, [1] * 257)
    player.release(player.running["a"][0], 3)
    for call in (player.manager.commit, player.manager.release):
        with pytest.raises(EngineError, match="not open"):
            call(view, TOKENS)


def test_sharing_all_charges_closed_pages_to_the_public_share() -> None:
    manager = make_manager(24, ShareAll())
    manager.set_quotas({"a": 4, "b": 4}, 3)
    player = Player(manager)
    serve(player, "a/1", TOKENS)
    assert (manager.used("a"), manager.used("public")) == (1, 3)
    match = manager.match(TOKENS, account="b", scope="b/1")
    assert (len(match.public), match.partial, match.cached_tokens) == (3, None, 192)
    assert manager.match(TOKENS, account="a", scope="a/1").cached_tokens == len(TOKENS)
    player.open("b", "b/1", prompt(1, 2, 3, 4))
    assert (manager.used("b"), manager.used("public")) == (1, 3)
    check(manager)


def test_stats_count_pages_views_and_accounts(player: Player) -> None:
    serve(player, "a/1", TOKENS)
    player.open("a", "a/1", prompt(1))
    player.manager.evict_pages("a", 1)
    stats = player.manager.stats()
    assert (stats.pages_total, stats.pages_used, stats.pages_free, stats.open_views) == (
        24,
        3,
        21,
        1,
    )
    assert stats.accounts["a"] == AccountUse(8, 3, 2, 1)


@pytest.fixture
def beginners() -> CacheManager:
    """Eight pages of two accounts, of which each may begin two sequences."""
    spec = replace(SPEC, window_tokens=128, first_extra_bytes=64)
    manager = make_manager(16, spec=spec, num_first=4)
    manager.set_quotas({"a": 8, "b": 8}, 0)
    return manager


def test_a_sequences_first_page_alone_is_of_the_first_kind(beginners: CacheManager) -> None:
    player = Player(beginners)
    player.open("a", "a/1", prompt(1, 2, 3))
    kinds = [page.kind for page in beginners._held[0].pages]
    assert kinds == [PageKind.FIRST, PageKind.PLAIN, PageKind.PLAIN]
    player.fork(player.running["a"][0])
    player.open("a", "a/1", [*prompt(1, 2), 7])
    assert beginners._store.accounts["a"].used_first == 1, "found again, not begun again"
    check(beginners)


def test_a_share_has_room_for_so_many_first_pages(beginners: CacheManager) -> None:
    player = Player(beginners)
    for block in (1, 2):
        player.open("a", "a/1", prompt(block, block))
    view = beginners.open_view(beginners.match([9], account="a", scope="a/1"), 1)
    with pytest.raises(QuotaExceeded, match="begins one more sequence; its share has room for 2"):
        beginners.extend(view, 1)
    player.open("b", "b/1", prompt(5, 5))
    player.release(player.running["a"][0], 128)
    beginners.extend(view, 1)
    assert beginners.match(prompt(1, 1), account="a", scope="a/1").cached_tokens == 0
    assert beginners.match(prompt(2, 2), account="a", scope="a/1").cached_tokens == 128
    check(beginners)


def test_more_shares_than_sequences_are_refused(beginners: CacheManager) -> None:
    with pytest.raises(ConfigError, match=r"5 shares .* for 4 sequences; raise max_num_seqs"):
        beginners.set_quotas(dict.fromkeys("abcde", 2), 0)


def test_small_shares_beside_a_large_one_may_begin_a_sequence_each(beginners: CacheManager) -> None:
    beginners.set_quotas({"a": 13, "b": 1, "c": 1}, 1)
    shares = {name: a.quota_first for name, a in beginners._store.accounts.items()}
    assert shares == {"a": 1, "b": 1, "c": 1, "public": 1}
