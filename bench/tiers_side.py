"""An engine with a disk below it, that counts what its steps spend there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from bench.ours import TENANT, Ours, greedy
from kvkeep.cache.tier.files import Directory
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.pages import TieredPages
from kvkeep.cache.tiers import Copy, Install, Read
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.loop import STALL_WAIT_S
from kvkeep.engine.options import EngineOptions, KeyOptions, ShieldName
from kvkeep.engine.sealers import Sealing, sealing_of
from kvkeep.eviction.policy import KeepAll
from kvkeep.quant.codec import Codec
from kvkeep.sealing import SealContext
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS

TOKENS: Final = 4_096
POOL_BYTES: Final = 2 << 30
DISK_BYTES: Final = 4 << 30


def sealing_in(folder: Path, mode: ShieldName) -> Sealing:
    """Return what seals pages; its key store and key file are made in a folder."""
    store = KeyOptions(store=str(folder / "keys.json"))
    return sealing_of(EngineOptions(model="", shield=mode, keys=store))


class Timed:
    """A tier that counts the seconds spent in it."""

    def __init__(self, tier: TieredPages) -> None:
        self.tier = tier
        self.spent_s = self.worked_s = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is done: by the clock, and this thread's own work of that."""
        begun, worked = time.perf_counter(), time.thread_time()
        yield
        self.spent_s += time.perf_counter() - begun
        self.worked_s += time.thread_time() - worked

    def holds(self, context: SealContext) -> bool:
        """Ask the tier."""
        with self.counted():
            return self.tier.holds(context)

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        """Ask the tier."""
        with self.counted():
            self.tier.fetch(context, layer_bytes, install, done)

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Read,
        expires_s: float | None,
    ) -> Copy | None:
        """Ask the tier."""
        with self.counted():
            copy = self.tier.store(context, layer_bytes, read, expires_s)
        return None if copy is None else _TimedCopy(self, copy)

    def forget(self, owner: str) -> int:
        """Ask the tier."""
        return self.tier.forget(owner)

    def poll(self) -> None:
        """Ask the tier."""
        with self.counted():
            self.tier.poll()


class _TimedCopy(NamedTuple):
    timed: Timed
    copy: Copy

    def take(self, *, last: bool) -> bool:
        """Copy the page."""
        with self.timed.counted():
            return self.copy.take(last=last)

    def cancel(self) -> None:
        """Let it go."""
        self.copy.cancel()


class Side:
    """An engine with a disk below it."""

    def __init__(
        self, model: Path, folder: Path, mode: ShieldName, codec: Codec, threads: int
    ) -> None:
        self.folder = folder / f"{mode}-tier"
        files = Directory(self.folder)
        sizes = TierSizes(disk_bytes=DISK_BYTES)
        self.sealing = sealing_in(folder, mode)
        self.timed = Timed(TieredPages(self.sealing.sealer, sizes, files))
        parts = Parts(
            techniques=Techniques(codec, NoShield(), KeepAll()),
            policy=ShareNothing(),
            tier=self.timed,
        )
        self.ours = Ours(model, threads=threads, kv_cache_bytes=POOL_BYTES, parts=parts)
        self.core.caches.tiers = self.timed.tier  # as a server has it: its loop asks what is due
        self.timed.tier.set_shares({TENANT: 1.0}, {})
        self.prompt = self.ours.prompt(TOKENS + 1)
        self.waited_s = 0.0
        """Of the last prompt's seconds, those before anything of it was computed."""
        self.waits: list[float] = []
        """The same of all that came from the disk."""

    @property
    def core(self) -> EngineCore:
        """Return the engine."""
        return self.ours.core

    def first_token_s(self, prompt: Sequence[int], scope: str | None = None) -> float:
        """Return the seconds to a prompt's first token."""
        self.ours.submit(prompt, greedy(1), scope=scope)
        begun = waited = time.perf_counter()
        while not self.core.idle():
            self.core.step()
            if self.core.stalled:
                time.sleep(self.core.caches.pause_s(STALL_WAIT_S, STALL_WAIT_S))
                waited = time.perf_counter()
        self.waited_s = waited - begun
        return time.perf_counter() - begun

    def write(self) -> None:
        """Wait until what rests is on the disk, and evict it from the pool."""
        for manager in self.core.caches.managers.values():
            if manager.below is not None:
                manager.below.flush(time.monotonic() + 60)
            manager.evict_pages(TENANT, manager.pool.num_pages)
        while self.timed.tier._back.queue.busy:  # noqa: SLF001 - nobody else needs to know
            self.timed.poll()
            time.sleep(STALL_WAIT_S)
        self.timed.poll()
        self.drop_file_cache()

    def drop_file_cache(self) -> None:
        """Let the system forget the files."""
        for path in self.folder.glob("*.segment"):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)

    def hit_s(self, prompt: Sequence[int]) -> float:
        """Return the seconds to the first token of a prompt that lies on the disk."""
        self.write()
        before = self.timed.tier.uses()[-1].hits
        took = self.first_token_s(prompt, "kept")
        hits = self.timed.tier.uses()[-1].hits - before
        if hits < (len(prompt) - 1) // PAGE_TOKENS - 1:
            raise RuntimeError(f"only {hits} pages came from the disk")
        self.waits.append(self.waited_s)
        return took

    def close(self) -> None:
        """End the engine and its tier."""
        self.core.close()
        self.sealing.close()
