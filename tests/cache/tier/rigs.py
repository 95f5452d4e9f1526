"""A tier as an engine drives it, over a directory in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvkeep.cache.accounts import Retention
from kvkeep.cache.tier.frames import Frames
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.pages import TieredPages
from kvkeep.cache.tier.records import record_bytes
from kvkeep.cache.tiers import TierUse
from kvkeep.errors import KeysUnavailable
from kvkeep.sealing import Opened, SealContext, TierSealer
from kvkeep.sealing import layers_of as cut
from kvkeep.shield.plain import PlainSealer
from kvkeep.types import PageTag
from tests.cache.tier.disks import Disk

SIZES = (600, 400)
"""Of a page's layers."""
FRAME = PlainSealer().frame_bytes(SIZES)
RECORD = record_bytes(FRAME)
MIB = 1 << 20
KINDS = {
    "memory": TierSizes(memory_bytes=MIB),
    "disk": TierSizes(disk_bytes=MIB),
    "both": TierSizes(MIB, MIB),
}
SHARES = {"a": 0.5, "b": 0.25}


def page(number: int, owner: str = "a") -> SealContext:
    return SealContext(owner, PageTag(owner), number.to_bytes(32, "big"), b"m" * 32, b"s" * 16)


def layers_of(context: SealContext) -> list[bytes]:
    text = f"{context.owner}.{int.from_bytes(context.chain_hash, 'big')}."
    return [(f"{layer}.{text}".encode() * size)[:size] for layer, size in enumerate(SIZES)]


def write_layers(context: SealContext, into: memoryview) -> None:
    into[:] = b"".join(layers_of(context))


class NoKeys(PlainSealer):
    """A sealer whose keys can be away, for names or for frames alone."""

    away = False
    closed = False

    def open(
        self,
        context: SealContext,
        frame: memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> Opened:
        if self.closed:
            raise KeysUnavailable("the keys are away")
        return super().open(context, frame, layer_bytes, into)

    def name_of(self, context: SealContext) -> bytes | None:  # type: ignore[override]
        return None if self.away else super().name_of(context)

    def shelf_of(self, owner: str) -> bytes | None:  # type: ignore[override]
        return None if self.away else super().shelf_of(owner)


@dataclass
class Rig:
    """A tier, driven as an engine drives it."""

    sizes: TierSizes
    disk: Disk = field(default_factory=Disk)
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    terms: dict[str, Retention] = field(default_factory=dict)
    now: float = 1000.0
    real: TierSealer | None = None
    """What seals in place of `sealer`."""
    remote: Callable[[], Frames] | None = None

    def __post_init__(self) -> None:
        self.sealer = NoKeys()
        files = self.disk if self.sizes.disk_bytes else None
        remote = None if self.remote is None else self.remote()
        sealer, clock = self.real or self.sealer, lambda: self.now
        self.tier = TieredPages(sealer, self.sizes, files, clock, remote=remote)
        self.tier.set_shares(self.shares, self.terms)

    def store(self, *pages: SealContext, expires_s: float | None = None) -> None:
        for context in pages:
            copy = self.tier.store(context, SIZES, partial(write_layers, context), expires_s)
            if copy is not None:
                copy.take(last=True)

    def fetch(self, context: SealContext) -> list[bytes] | None:
        """Return a page's layers, None for a miss."""
        found: dict[int, bytes | memoryview] = {}
        ended: list[bool] = []
        self.tier.fetch(context, SIZES, found.__setitem__, ended.append)
        self.until(lambda: bool(ended))
        if ended != [True]:
            return None
        runs = [memoryview(found[layer]) for layer in sorted(found)]
        return [bytes(layer) for layer in cut(runs, SIZES)]

    def until(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not ready():
            self.tier.poll()
            assert time.monotonic() < end, "the tier makes no progress"
            time.sleep(0.0005)

    def settle(self) -> None:
        """Wait until everything is written."""
        self.until(lambda: not (self.tier._back.queue.busy or self.tier.due()))
        self.tier.poll()

    def held(self, pages: Sequence[SealContext]) -> list[int]:
        return [i for i, context in enumerate(pages) if self.tier.holds(context)]

    def use(self, tier: str = "disk") -> TierUse:
        return next(use for use in self.tier.uses() if use.tier == tier)

    def restart(self) -> None:
        self.tier.close(5.0)
        self.__post_init__()
