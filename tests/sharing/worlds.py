"""Two worlds, with and without some tenants' prompts: what the others see must be the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st

from kvkeep.cache.manager import CacheManager
from kvkeep.sharing.members import Directory, Member
from kvkeep.sharing.monitor import Monitor
from kvkeep.sharing.pins import Pins
from kvkeep.sharing.policies.dp import Noisy
from kvkeep.sharing.policies.isolate import ShareNothing
from kvkeep.sharing.policies.pinned import SharePinned
from kvkeep.sharing.policies.safekv import SafeKV
from kvkeep.sharing.policies.salt import ShareBySalt
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.policies.share_all import ShareAll
from kvkeep.sharing.promotion import Promotion, PromotionParts
from kvkeep.sharing.rules import Rule
from kvkeep.sharing.votes import PromotionLimits
from kvkeep.types import SharingPolicy
from tests.cache.player import Player, check, make_manager, prompt

K = 4
BYSTANDERS = tuple(f"b{i}" for i in range(K + 1))
TEMPLATE = (8, 9)
"""Blocks that every bystander sends before anything else happens, and again after a restart."""
QUOTA = 9
PUBLIC = 6
PINNING = "pinning"
TAINT = 666
"""A token that the fake detector finds."""


def decode(ids: Sequence[int]) -> str:
    """Return one character per token."""
    return "".join(chr(0x4E00 + token) for token in ids)


@dataclass(frozen=True)
class Finds:
    """A detector that finds one token; by default none that is ever sent, as if it missed all."""

    token: int = 5000
    version: str = "fake-1"

    def first_doubt(self, text: str) -> int | None:
        at = text.find(chr(0x4E00 + self.token))
        return None if at < 0 else at


class MemoryStore:
    """Keeps state in memory, over restarts of one world."""

    def __init__(self) -> None:
        self.state: bytes | None = None

    def load(self) -> bytes | None:
        return self.state

    def save(self, state: bytes) -> None:
        self.state = state


@dataclass
class Setting:
    """What a policy is made of, in each world its own."""

    directory: Directory = field(default_factory=Directory)
    store: MemoryStore = field(default_factory=MemoryStore)
    pins: Pins = field(default_factory=Pins)
    declared: tuple[int, ...] = ()
    """Blocks of a prefix that the operator declares public, before anybody asks."""
    inspector: Finds = field(default_factory=Finds)
    now: float = 0.0

    def promotion(self, rule: Rule, **limits: int) -> Promotion:
        monitor = Monitor(clock=lambda: self.now)
        parts = PromotionParts(
            rule, self.directory, decode, self.inspector, self.store, monitor, self.pins
        )
        chosen = PromotionLimits(**({"unit_pages": 1} | limits))  # type: ignore[arg-type]
        return Promotion(parts, chosen, clock=lambda: self.now)


Make = Callable[[Setting], SharingPolicy]
Managing = Callable[[int, SharingPolicy], CacheManager]
"""Makes a manager of so many pages."""


def isolate(setting: Setting) -> SharingPolicy:
    return ShareNothing()


def selective(setting: Setting) -> SharingPolicy:
    return setting.promotion(AtLeast(K, life_epochs=100_000))


def dp(setting: Setting) -> SharingPolicy:
    return setting.promotion(Noisy(b"k" * 16, window_epochs=2))


def pinned(setting: Setting) -> SharingPolicy:
    setting.declared = TEMPLATE[:1]
    return SharePinned(setting.pins)


def salt(setting: Setting) -> SharingPolicy:
    return ShareBySalt()


def share_all(setting: Setting) -> SharingPolicy:
    return ShareAll()


def safekv(setting: Setting) -> SharingPolicy:
    return SafeKV(setting.directory, decode, setting.inspector)


@dataclass(frozen=True)
class Op:
    """One thing that one tenant does, or an epoch's end, or a restart."""

    actor: str
    name: str
    which: int
    blocks: tuple[int, ...]
    tail: int


class World:
    """A cache with its policy, driven by operations."""

    def __init__(
        self, make: Make, tenants: Sequence[str], managing: Managing = make_manager
    ) -> None:
        self.make = make
        self.managing = managing
        self.tenants = (*tenants, *BYSTANDERS)
        self.setting = Setting()
        self.setting.directory.set({name: Member(name, "all") for name in self.tenants})
        self.seen: dict[str, list[object]] = {}
        self.player = self._start()

    def _start(self) -> Player:
        """Start with nothing but pins in memory; the bystanders make their template public."""
        size = QUOTA * len(self.tenants) + PUBLIC
        manager = self.managing(size, self.make(self.setting))
        self.player = Player(manager, {}, self.seen)
        self._pin(manager)
        manager.set_quotas(dict.fromkeys(self.tenants, QUOTA), PUBLIC)
        for name in BYSTANDERS:
            self.player.open(name, f"{name}/0", prompt(*TEMPLATE))
        self.player.end_views()
        self.end_epoch()
        self.end_epoch()
        return self.player

    def _pin(self, manager: CacheManager) -> None:
        """Publish what is declared, as a server does before its first request."""
        if not self.setting.declared:
            return
        manager.set_quotas({PINNING: QUOTA}, PUBLIC)
        tokens = prompt(*self.setting.declared, tail=1)
        self.player.open(PINNING, PINNING, tokens)
        self.player.end_views()
        for page in manager.match(tokens, account=PINNING, scope=PINNING).own:
            if (twin := manager.promote(page, pinned=True)) is not None:
                self.setting.pins.add([twin.hash])

    @property
    def manager(self) -> CacheManager:
        return self.player.manager

    def end_epoch(self) -> None:
        self.setting.now += 60.0
        self.player.manager.end_epoch(self.setting.now)

    def play(self, op: Op) -> None:
        player, run = self.player, self.player.pick(op.actor, op.which)
        if op.name == "epoch":
            self.end_epoch()
        elif op.name == "restart":
            self._start()
        elif op.name == "open":
            scope = f"{op.actor}/{op.which % 2}"
            player.open(op.actor, scope, prompt(*op.blocks, tail=op.tail))
        elif op.name == "evict":
            player.evict(op.actor, op.which)
        elif run is None:
            return
        elif op.name == "feed":
            player.feed(run, prompt(*op.blocks, tail=op.tail)[:80])
        elif op.name == "fork":
            player.fork(run)
        else:
            player.release(run, len(run.tokens))
            if op.name == "preempt" and run.tokens:
                player.open(op.actor, run.view.tag.scope, run.tokens)

    def run(self, ops: Sequence[Op]) -> None:
        for op in ops:
            self.play(op)
        check(self.manager)


ACTIONS = ["open"] * 8 + ["release", "release", "feed", "fork", "preempt", "evict"]
SECRET = [(1,), (1, 2), (*TEMPLATE, 1), (*TEMPLATE, 1, 2)]
COMMON = [(5,), (5, 6), (*TEMPLATE, 5), TEMPLATE]


def scripts(attackers: Sequence[str], victims: Sequence[str]) -> st.SearchStrategy[list[Op]]:
    """Return interleavings in which victims and attackers send each other's chains.

    The bystanders' own chains are theirs and the attackers'; everybody uses the template.
    """

    def acts(actors: Sequence[str], chains: Sequence[tuple[int, ...]]) -> st.SearchStrategy[Op]:
        counts, kinds = st.integers(0, 3), st.sampled_from(ACTIONS)
        return st.builds(
            Op, st.sampled_from(list(actors)), kinds, counts, st.sampled_from(chains), counts
        )

    worldly = st.sampled_from(["epoch"] * 7 + ["restart"])
    world = st.builds(Op, st.just(""), worldly, st.just(0), st.just(()), st.just(0))
    insiders = acts((*attackers, *victims), SECRET)
    others = acts((*attackers, *BYSTANDERS), COMMON)
    return st.lists(st.one_of(insiders, insiders, others, world), max_size=30)


def transcripts(make: Make, ops: Sequence[Op], attackers: Sequence[str]) -> bytes:
    """Return all that some tenants saw, as bytes."""
    world = World(make, sorted({*attackers, "v0", "v1"}))
    world.run(ops)
    return repr([world.seen.get(name) for name in attackers]).encode()
