"""What is held stays where it is, whatever its account does meanwhile."""

from __future__ import annotations

from kvkeep.types import PAGE_TOKENS
from tests.cache.player import Player, make_manager, prompt

TOKENS = prompt(1, 2, 3, tail=9)


def test_held_pages_are_not_evicted_and_go_once_they_are_let_go() -> None:
    manager = make_manager(16)
    manager.set_quotas({"a": 6}, 0)
    player = Player(manager)
    player.open("a", "a/1", TOKENS)
    player.release(player.running["a"][0], len(TOKENS))
    match = manager.match(TOKENS, account="a", scope="a/1")
    hold = manager.holds.take(match)
    assert len(hold.slots) == len(TOKENS) // PAGE_TOKENS
    slots = hold.slots
    manager.evict_pages("a", 99)
    assert hold.slots == slots
    assert manager.match(TOKENS, account="a", scope="a/1").cached_tokens == 3 * PAGE_TOKENS
    hold.end()
    assert hold.slots == []
    assert manager.evict_pages("a", 99) == 3
    assert manager.stats().pages_used == 0


def test_what_is_purged_while_it_is_held_is_freed_at_the_end() -> None:
    manager = make_manager(16)
    manager.set_quotas({"a": 6}, 0)
    player = Player(manager)
    player.open("a", "a/1", TOKENS)
    player.release(player.running["a"][0], len(TOKENS))
    hold = manager.holds.take(manager.match(TOKENS, account="a", scope="a/1"))
    manager.forget("a")
    assert manager.stats().pages_used == 3
    hold.end()
    assert manager.stats().pages_used == 0
