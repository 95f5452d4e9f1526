from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvkeep.cache.manager import CacheManager
from kvkeep.cache.tiers import Install
from kvkeep.errors import EngineError
from kvkeep.sealing import SealContext
from kvkeep.types import PAGE_TOKENS
from tests.cache.player import Player, check, check_rows, make_manager, prompt
from tests.toys import KeptPages


class SlowTier(KeptPages):
    """Holds what was evicted; each poll brings one page, its last layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.due: list[Callable[[], None]] = []
        self.failing: set[SealContext] = set()
        self.last_first = False

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        layers = list(self.kept[context])

        def run() -> None:
            for layer, data in reversed(list(enumerate(layers))):
                install(layer, data)
            done(context not in self.failing)

        self.due.insert(0 if self.last_first else len(self.due), run)

    def poll(self) -> None:
        if self.due:
            self.due.pop(0)()


TOKENS = prompt(1, 2, 3, tail=9)


def spilled(keep: int = 0) -> tuple[CacheManager, SlowTier]:
    """Return a manager whose tier holds the pages of TOKENS but the first `keep`."""
    tier = SlowTier()
    manager = make_manager(16, tier=tier)
    manager.set_quotas({"a": 6, "b": 6}, 0)
    player = Player(manager)
    player.open("a", "a/1", TOKENS)
    player.release(player.running["a"][0], len(TOKENS))
    manager.evict_pages("a", 4 - keep)
    return manager, tier


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("last_first", [False, True])
def test_pages_come_back_whole_and_only_then(keep: int, last_first: bool) -> None:
    manager, tier = spilled(keep)
    tier.last_first = last_first
    match = manager.match(TOKENS, account="a", scope="a/1")
    assert (match.cached_tokens, len(match.pending)) == (keep * PAGE_TOKENS, 3 - keep)
    fetch = manager.begin_fetch(match, TOKENS)
    assert fetch is not None
    while not fetch.done:
        assert manager.match(TOKENS, account="a", scope="a/1").cached_tokens < 3 * PAGE_TOKENS
        check(manager)
        manager.poll()
    assert fetch.installed_pages == 3 - keep
    manager.end_fetch(fetch)
    check(manager)
    match = manager.match(TOKENS, account="a", scope="a/1")
    assert (match.cached_tokens, match.pending) == (3 * PAGE_TOKENS, ())
    view = manager.open_view(match, len(TOKENS))
    check_rows(manager, view, TOKENS)
    with pytest.raises(EngineError, match="before"):
        manager.end_fetch(fetch)


def test_a_failed_page_ends_the_fetch_and_keeps_what_came_before() -> None:
    manager, tier = spilled()
    match = manager.match(TOKENS, account="a", scope="a/1")
    tier.failing = {match.pending[1]}
    fetch = manager.begin_fetch(match, TOKENS)
    assert fetch is not None
    manager.poll()
    states = [fetch.done]
    manager.poll()
    assert [*states, fetch.done] == [False, True]
    manager.end_fetch(fetch)
    manager.poll()
    check(manager)
    assert manager.match(TOKENS, account="a", scope="a/1").cached_tokens == PAGE_TOKENS
    assert manager.used("a") == 1


@pytest.mark.parametrize("damage", ["short", "missing", "unknown"])
def test_damaged_bytes_are_a_miss(damage: str) -> None:
    manager, tier = spilled()
    match = manager.match(TOKENS, account="a", scope="a/1")
    layers = tier.kept[match.pending[0]]
    good = list(layers)
    layers[:] = {
        "short": [good[0], good[1][:-1]],
        "missing": good[:1],
        "unknown": [*good, good[0]],
    }[damage]
    fetch = manager.begin_fetch(match, TOKENS)
    assert fetch is not None
    manager.poll()
    assert fetch.done
    manager.end_fetch(fetch)
    check(manager)
    assert manager.used("a") == 0


@pytest.mark.parametrize("how", ["end", "forget", "scope"])
def test_a_cancelled_fetch_leaves_nothing_and_ignores_late_bytes(how: str) -> None:
    manager, tier = spilled()
    fetch = manager.begin_fetch(manager.match(TOKENS, account="a", scope="a/1"), TOKENS)
    assert fetch is not None
    if how == "forget":
        manager.forget("a")
    elif how == "scope":
        manager.drop_scope("a", "a/1")
    assert fetch.done is (how != "end")
    manager.end_fetch(fetch)
    check(manager)
    player = Player(manager)
    player.open("b", "b/1", TOKENS)
    while tier.due:
        manager.poll()
    check(manager)
    check_rows(manager, player.running["b"][0].view, TOKENS)
    assert manager.used("a") == 0


def test_another_scope_finds_nothing_in_the_tier() -> None:
    manager, _ = spilled()
    assert manager.match(TOKENS, account="a", scope="a/2").pending == ()
    assert manager.match(TOKENS, account="b", scope="b/1").pending == ()


def test_a_fetch_takes_no_more_than_the_account_has_room_for() -> None:
    manager, _ = spilled()
    manager.set_quotas({"a": 2}, 0)
    match = manager.match(TOKENS, account="a", scope="a/1")
    fetch = manager.begin_fetch(match, TOKENS)
    assert fetch is not None
    assert manager.used("a") == 2
    manager.end_fetch(fetch)
    manager.set_quotas({}, 0)
    assert manager.begin_fetch(match, TOKENS) is None


def test_a_page_computed_meanwhile_is_not_kept_twice() -> None:
    manager, tier = spilled()
    fetch = manager.begin_fetch(manager.match(TOKENS, account="a", scope="a/1"), TOKENS)
    assert fetch is not None
    player = Player(manager)
    player.open("a", "a/1", prompt(1))
    while tier.due:
        manager.poll()
    check(manager)
    manager.end_fetch(fetch)
    player.release(player.running["a"][0], 64)
    assert manager.used("a") == 3


def test_without_a_tier_nothing_is_fetched() -> None:
    manager = make_manager()
    manager.set_quotas({"a": 4}, 0)
    match = manager.match(TOKENS, account="a", scope="a/1")
    manager.poll()
    assert manager.begin_fetch(match, TOKENS) is None
