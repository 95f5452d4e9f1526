from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from kvkeep.cache import below as below_module
from kvkeep.cache.accounts import Retention
from kvkeep.cache.below import Below, form_digest
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.pace import Pace
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.pages import TieredPages
from kvkeep.cache.tier.records import record_bytes
from kvkeep.cache.tiers import Copy, Install, Read
from kvkeep.sealing import SealContext
from kvkeep.shield.plain import PlainSealer
from kvkeep.types import PageKind
from tests.cache.player import SPEC, Player, check, make_manager, prompt
from tests.cache.tier.disks import Disk

PAGE_BYTES = SPEC.page_bytes


@dataclass
class Order:
    """A tier that notes what it is asked; its copies are as slow as told."""

    asked: list[tuple[str, bytes]] = field(default_factory=list)
    expires: list[float | None] = field(default_factory=list)
    full: bool = False

    def holds(self, context: SealContext) -> bool:
        return False

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        done(False)

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> Copy:
        read(memoryview(bytearray(sum(layer_bytes))))
        self.asked.append(("room", context.chain_hash))
        self.expires.append(expires_s)
        return Noted(self, context.chain_hash)

    def forget(self, owner: str) -> int:
        return 7

    def poll(self) -> None:
        return


@dataclass
class Noted:
    tier: Order
    chain: bytes

    def take(self, *, last: bool) -> bool:
        if self.tier.full and not last:
            return False
        self.tier.asked.append(("last" if last else "copy", self.chain))
        return True

    def cancel(self) -> None:
        self.tier.asked.append(("cancel", self.chain))


def served(tier: Order, blocks: int = 3) -> CacheManager:
    """Return a manager with a prompt at rest."""
    manager = make_manager(16, tier=tier)
    manager.set_quotas({"a": 12}, 0)
    player = Player(manager)
    player.open("a", "a/1", prompt(*range(1, blocks + 1), tail=5))
    player.end_views()
    return manager


def below_of(manager: CacheManager) -> Below:
    assert manager.below is not None
    return manager.below


def kinds(tier: Order) -> list[str]:
    return [kind for kind, _ in tier.asked]


def test_room_is_asked_for_when_pages_come_to_rest_and_bytes_follow() -> None:
    tier = Order()
    manager = served(tier)
    assert kinds(tier) == ["room"] * 3
    assert below_of(manager).copying
    manager.poll()
    assert kinds(tier) == ["room"] * 3 + ["copy"] * 3
    assert [chain for _, chain in tier.asked[:3]] == [chain for _, chain in tier.asked[3:]]
    assert not below_of(manager).copying


def test_what_is_evicted_first_is_copied_at_once() -> None:
    tier = Order()
    manager = served(tier)
    assert manager.evict_pages("a", 3) == 3
    assert kinds(tier) == ["room"] * 3 + ["last"] * 2
    manager.poll()
    assert kinds(tier) == ["room"] * 3 + ["last"] * 2 + ["copy"]


def test_copies_wait_while_the_tier_is_behind() -> None:
    tier = Order(full=True)
    manager = served(tier)
    manager.poll()
    assert kinds(tier) == ["room"] * 3
    tier.full = False
    below_of(manager).flush(time.monotonic() + 5)
    assert kinds(tier)[3:] == ["copy"] * 3


def test_a_flush_ends_in_time() -> None:
    tier = Order(full=True)
    manager = served(tier)
    below_of(manager).flush(time.monotonic() + 0.01)
    assert kinds(tier) == ["room"] * 3


def test_a_step_copies_a_bounded_part() -> None:
    tier = Order()
    manager = make_manager(200, tier=tier)
    manager.set_quotas({"a": 199}, 0)
    player = Player(manager)
    pages = 3 * (below_module.COPY_BYTES // PAGE_BYTES) // 2
    player.open("a", "a/1", prompt(*range(1, pages + 1)))
    player.end_views()
    below_of(manager)._pace = Pace(below_module.COPY_BYTES, below_module.MOST_BYTES, lambda: 0.0)
    manager.poll()
    copied = kinds(tier).count("copy")
    assert copied == below_module.COPY_BYTES // PAGE_BYTES < pages
    manager.poll()
    assert kinds(tier).count("copy") == pages


def test_nothing_is_copied_of_what_is_dropped() -> None:
    tier = Order()
    manager = served(tier)
    gone = manager.forget("a")
    assert gone.pages == 4 + 7, "a tier's pages count too"
    assert kinds(tier) == ["room"] * 3 + ["cancel"] * 3
    assert not below_of(manager).copying


def test_what_may_not_leave_stays_and_what_is_old_says_so() -> None:
    tier = Order()
    manager = make_manager(16, tier=tier)
    manager.set_quotas({"a": 8, "b": 8}, 0)
    manager.set_retention({"a": Retention(to_tier=False), "b": Retention(ttl_s=50.0)})
    player = Player(manager)
    for account in "ab":
        player.open(account, f"{account}/1", prompt(1, 2))
    player.end_views()
    assert len(tier.asked) == 2
    assert all(when is not None and 40 < when - time.time() < 60 for when in tier.expires)


def test_the_form_is_what_decides_a_pages_bytes() -> None:
    forms = {
        form_digest(spec, order)
        for spec in (SPEC, replace(SPEC, head_dim=16), replace(SPEC, window_tokens=128))
        for order in (b"avx2", b"avx512")
    }
    assert len(forms) == 6


def test_a_first_page_is_of_a_kind_of_its_own() -> None:
    tier = Order()
    spec = replace(SPEC, first_extra_bytes=64)
    manager = make_manager(16, tier=tier, spec=spec, num_first=4)
    manager.set_quotas({"a": 8}, 0)
    player = Player(manager)
    player.open("a", "a/1", prompt(1, 2))
    player.end_views()
    assert len(tier.asked) == 2, "both layers of both kinds have their sizes"
    seen: list[SealContext] = []
    below = below_of(manager)
    below._tier = replace_holds(tier, seen)
    manager.evict_pages("a", 8)
    assert len(manager.match(prompt(1, 2), account="a", scope="a/1").pending) == 2
    assert [context.kind for context in seen] == [PageKind.FIRST, PageKind.PLAIN]


def replace_holds(tier: Order, seen: list[SealContext]) -> Order:
    """Return a tier that holds everything and notes it."""

    class Holds(Order):
        def holds(self, context: SealContext) -> bool:
            seen.append(context)
            return True

    return Holds(tier.asked)


@dataclass(frozen=True)
class Op:
    account: str
    name: str
    which: int
    tokens: tuple[int, ...]


OPS = st.builds(
    Op,
    st.sampled_from(["a", "b"]),
    st.sampled_from(["open", "open", "release", "evict", "poll"]),
    st.integers(0, 3),
    st.lists(st.integers(1, 2), min_size=1, max_size=4).map(lambda blocks: tuple(prompt(*blocks))),
)


def fetched(manager: CacheManager, account: str, scope: str, tokens: list[int]) -> int:
    """Bring up what lies below, as a scheduler does; return how many pages came."""
    match = manager.match(tokens, account=account, scope=scope)
    fetch = manager.begin_fetch(match, np.array(tokens, np.int32))
    if fetch is None:
        return 0
    end = time.monotonic() + 10
    while not fetch.done:
        manager.poll()
        assert time.monotonic() < end
    manager.end_fetch(fetch)
    check(manager)
    return fetch.installed_pages


def transcript(ops: list[Op]) -> list[object]:
    frame = PlainSealer().frame_bytes([PAGE_BYTES // 2] * 2)
    sizes = TierSizes(6 * frame, 20 * record_bytes(frame))
    tier = TieredPages(PlainSealer(), sizes, Disk())
    shares = {"a": 0.5, "b": 0.5}
    tier.set_shares(shares, {})
    manager = make_manager(12, tier=tier)
    manager.set_quotas({"a": 6, "b": 6}, 0)
    player = Player(manager)
    for op in ops:
        run = player.pick(op.account, op.which)
        scope = f"{op.account}/{op.which % 2}"
        if op.name == "open":
            came = fetched(manager, op.account, scope, list(op.tokens))
            player.open(op.account, scope, list(op.tokens))
            player.note(op.account, "came", came)
        elif op.name == "evict":
            player.evict(op.account, op.which)
        elif op.name == "poll":
            manager.poll()
        elif run is not None:
            player.release(run, len(run.tokens))
    tier.close(5.0)
    check(manager)
    return player.seen.get("a", [])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(OPS, max_size=30))
def test_an_account_sees_its_own_operations_only_with_tiers_on(ops: list[Op]) -> None:
    assert transcript(ops) == transcript([op for op in ops if op.account == "a"])
