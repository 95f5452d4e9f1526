"""Views reserved for shadows: private, heard of by nobody, never found again."""

from __future__ import annotations

import numpy as np
import pytest

from kvkeep.errors import QuotaExceeded
from kvkeep.types import PAGE_TOKENS
from tests.cache.player import Player, check, make_manager, prompt
from tests.toys import PromoteOffered

TOKENS = prompt(1, 2, 3, tail=9)


def test_a_reserved_view_is_paid_for_at_once_and_leaves_nothing() -> None:
    manager = make_manager(24)
    manager.set_quotas({"a": 8}, 2)
    player = Player(manager)
    player.open("a", "a/1", TOKENS)
    player.release(player.running["a"][-1], len(TOKENS))
    view = manager.reserve_view(5 * PAGE_TOKENS - 1, account="a", scope="a/1")
    assert (view.num_pages, view.length, manager.room("a")) == (5, 0, 3)
    with pytest.raises(QuotaExceeded):
        manager.reserve_view(4 * PAGE_TOKENS, account="a", scope="a/1")
    view.length = len(TOKENS)
    manager.release(view, np.array(TOKENS, np.int32))
    assert manager.room("a") == 8
    check(manager)
    assert manager.stats().pages_used == 3, "of four pages one made way, and none came"


def test_nobody_hears_of_a_reserved_view() -> None:
    class Deaf(PromoteOffered):
        def offer(self, chain: object, tenant: str) -> None:
            raise AssertionError("offered")

        def observe(self, access: object) -> None:
            raise AssertionError("observed")

    manager = make_manager(24, Deaf())
    manager.set_quotas({"a": 8}, 2)
    view = manager.reserve_view(3 * PAGE_TOKENS, account="a", scope="a/1")
    view.length = len(TOKENS)
    manager.release(view, np.array(TOKENS, np.int32))
    check(manager)
