"""Public pages that outlive a restart below memory, or leave it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import pytest

from kvkeep.cache.manager import CacheManager
from kvkeep.cache.radix import TOKEN_KEYS, PageKeys
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.pages import TieredPages
from kvkeep.sealing import PUBLIC_OWNER
from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.shield.plain import PlainSealer
from kvkeep.shield.tiles import PageLabels, TileKeys
from tests.cache.player import SPEC, Player, make_manager, prompt
from tests.cache.tier.disks import Disk
from tests.sharing.worlds import BYSTANDERS, TEMPLATE, K, MemoryStore, Setting

SHARES = {**dict.fromkeys((*BYSTANDERS, "x0"), 0.1), PUBLIC_OWNER: 0.3}
TOKENS = prompt(*TEMPLATE, tail=3)
DISK = TierSizes(disk_bytes=4 << 20)


@dataclass
class Life:
    """One run of a cache over what outlives it."""

    setting: Setting
    disk: Disk
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    life_epochs: int = 1000
    keys: PageKeys = TOKEN_KEYS

    def __post_init__(self) -> None:
        self.setting.directory.set({name: Member(name, "all") for name in (*BYSTANDERS, "x0")})
        policy = self.setting.promotion(AtLeast(K, life_epochs=self.life_epochs))
        self.tier = TieredPages(PlainSealer(), DISK, self.disk, lambda: self.setting.now)
        self.tier.set_shares(self.shares, {})
        self.manager: CacheManager = make_manager(64, policy, self.tier, keys=self.keys)
        self.manager.set_quotas(dict.fromkeys((*BYSTANDERS, "x0"), 9), 6)
        self.player = Player(self.manager)

    def end_epoch(self) -> int:
        """End an epoch; return how many pages are public."""
        self.setting.now += 60.0
        self.manager.end_epoch(self.setting.now)
        self.tier.end_epoch(self.setting.now)
        return self.manager.public_pages

    def settle(self) -> None:
        """Let everything move that is on its way."""
        end = time.monotonic() + 10
        below = self.manager.below
        assert below is not None
        for _ in range(20):
            self.manager.poll()
            time.sleep(0.001)
        while below.copying or self.tier.due() or self.tier._back.queue.busy:
            self.manager.poll()
            assert time.monotonic() < end
            time.sleep(0.0005)

    def found(self) -> int:
        """Return how many pages others made public to a tenant."""
        match = self.manager.match(TOKENS, account="x0", scope="x0/0")
        assert match.cached_tokens == 0
        return len(match.snapshot)

    def end(self) -> None:
        self.settle()
        self.tier.close(5.0)


def served(
    shares: dict[str, float] | None = None, life_epochs: int = 1000, keys: PageKeys = TOKEN_KEYS
) -> Life:
    """Return a life at whose end two pages were public."""
    life = Life(Setting(), Disk(), shares or dict(SHARES), life_epochs, keys)
    for name in BYSTANDERS:
        life.player.open(name, f"{name}/0", prompt(*TEMPLATE))
    life.player.end_views()
    life.end_epoch()
    assert life.end_epoch() == len(TEMPLATE)
    life.end()
    return life


def again(life: Life, **changes: object) -> Life:
    setting = replace(life.setting, **changes)  # type: ignore[arg-type]
    return Life(setting, life.disk, life.shares, life.life_epochs, life.keys)


@pytest.mark.parametrize("hidden", [False, True], ids=["tokens", "labels"])
def test_a_snapshot_comes_back_between_two_epochs_ends_and_not_for_a_request(
    hidden: bool,
) -> None:
    life = again(served(keys=PageLabels(TileKeys()) if hidden else TOKEN_KEYS))
    life.settle()
    assert life.found() == 0
    assert life.end_epoch() == 0, "its pages are on their way"
    life.settle()
    assert life.found() == 0, "and public at an epoch's end alone"
    assert life.end_epoch() == len(TEMPLATE)
    assert life.found() == len(TEMPLATE)
    life.player.open("x0", "x0/0", TOKENS)  # checks the rows
    life.player.end()
    life.end()


def test_nobody_asks_the_tier_for_public_pages_between_epochs_ends() -> None:
    life = again(served())
    for _ in range(3):
        life.player.open("x0", "x0/0", TOKENS)
        life.player.end_views()
        life.manager.forget("x0")
        life.settle()
    assert sum(use.hits + use.misses for use in life.tier.uses()) == 0
    life.end()


@pytest.mark.parametrize("what", ["votes", "rules"])
def test_nothing_comes_back_that_no_vote_carries(what: str) -> None:
    first = served()
    other = replace(first.setting.inspector, version="fake-2")
    life = again(first, **({"store": MemoryStore()} if what == "votes" else {"inspector": other}))
    for _ in range(3):
        assert life.end_epoch() == 0
        life.settle()
    assert sum(use.hits for use in life.tier.uses()) == 0
    life.end()


def test_what_is_no_longer_named_when_it_arrives_is_dropped() -> None:
    life = again(served(life_epochs=4))
    free = life.manager.pool.free_pages
    assert life.end_epoch() == 0
    assert life.manager.pool.free_pages == free - len(TEMPLATE)
    life.settle()
    life.setting.now += 3600.0
    assert life.end_epoch() == 0
    assert life.manager.pool.free_pages == free
    life.end()


def test_what_was_changed_below_memory_does_not_come_back() -> None:
    first = served()
    for data in first.disk.files.values():
        for at in range(500, len(data), 9000):
            data[at] ^= 1
    life = again(first)
    free = life.manager.pool.free_pages
    for _ in range(3):
        assert life.end_epoch() == 0
        life.settle()
    assert life.manager.pool.free_pages == free
    assert sum(use.misses for use in life.tier.uses()) == len(TEMPLATE)
    life.end()


def test_public_pages_have_a_quota_of_their_own() -> None:
    none = {name: share for name, share in SHARES.items() if name != PUBLIC_OWNER}
    life = again(served(none))
    for _ in range(3):
        assert life.end_epoch() == 0
        life.settle()
    life.end()
    one_page = {**SHARES, PUBLIC_OWNER: 1.5 * SPEC.page_bytes / (3 << 20)}
    life = again(served(one_page))
    assert len(life.tier._index.levels[-1].names(PlainSealer().shelf_of(PUBLIC_OWNER))) == 1
    life.end()
