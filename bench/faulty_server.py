"""A server whose disk fails now and then: `python -m bench.faulty_server FOLDER SEED`.

Real HTTP, a sealed disk tier below the demo model, and below that a directory in which operations
fail, are cut short or give out changed bytes, drawn from the seed. FOLDER holds `keys.json` and
what outlives it. Prints where it listens.
"""

from __future__ import annotations

import asyncio
import errno
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvkeep.cache.tier.files import Directory, File
from kvkeep.config import DEMO_MODEL
from kvkeep.engine import messages as m
from kvkeep.engine.build import build_core, default_parts
from kvkeep.engine.client import MessageClient
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.local import ThreadTransport
from kvkeep.engine.options import EngineOptions, KeyOptions
from kvkeep.models.text import TextModel
from kvkeep.server.options import Bind, ServerOptions
from kvkeep.server.serve import Listening, serve
from kvkeep.server.store import TenantStore

ADMIN: Final = "faults"
FAILS: Final = 0.04
"""Of all operations, those that raise."""
CHANGED: Final = 0.08
"""Of all reads, those that give a changed bit."""
SHORT: Final = 0.2
"""Of all writes, those that take a part."""


@dataclass
class Faults:
    """Draws what fails; nothing does while the directory is read at start."""

    seed: int
    awake: bool = False
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def strike(self) -> None:
        """Raise now and then."""
        if self.awake and self.draw.random() < FAILS:
            code = self.draw.choice((errno.EIO, errno.ENOSPC, errno.EROFS))
            raise OSError(code, errno.errorcode[code])

    def happens(self, share: float) -> bool:
        """Tell whether something of this probability happens."""
        return self.awake and self.draw.random() < share


@dataclass
class FaultyFile:
    """A `File` over another."""

    file: File
    faults: Faults

    def write(self, offset: int, data: memoryview) -> int:
        """Write all of it, a part, or half of it before it fails."""
        half = max(1, len(data) // 2)
        try:
            self.faults.strike()
        except OSError:
            self.file.write(offset, data[:half])
            raise
        return self.file.write(offset, data[:half] if self.faults.happens(SHORT) else data)

    def read(self, offset: int, length: int) -> bytes:
        """Read; a bit may be another."""
        self.faults.strike()
        found = self.file.read(offset, length)
        if not found or not self.faults.happens(CHANGED):
            return found
        changed = bytearray(found)
        changed[self.faults.draw.randrange(len(changed))] ^= 1 << self.faults.draw.randrange(8)
        return bytes(changed)

    def fill(self, offset: int, into: memoryview) -> int:
        """Read into memory; a bit may be another."""
        found = self.read(offset, len(into))
        into[: len(found)] = found
        return len(found)

    def size(self) -> int:
        """Return the length in bytes."""
        return self.file.size()

    def truncate(self, size: int) -> None:
        """Cut the file off."""
        self.faults.strike()
        self.file.truncate(size)

    def sync(self) -> None:
        """Make it durable."""
        self.faults.strike()
        self.file.sync()


class FaultyDirectory:
    """`Files` over a directory."""

    def __init__(self, path: Path, faults: Faults) -> None:
        self._files = Directory(path)
        self._faults = faults
        self.names, self.close = self._files.names, self._files.close

    def open(self, name: str) -> FaultyFile:
        """Return a file."""
        self._faults.strike()
        return FaultyFile(self._files.open(name), self._faults)

    def remove(self, name: str) -> None:
        """Delete a file."""
        self._faults.strike()
        self._files.remove(name)

    def sync(self) -> None:
        """Write the directory itself."""
        self._faults.strike()
        self._files.sync()


def options_in(folder: Path, *, tiers: bool) -> EngineOptions:
    """Return what an engine of these runs is started with."""
    return EngineOptions(
        model=str(DEMO_MODEL),
        threads=1,
        kv_cache_bytes=48 << 20,
        max_num_seqs=8,
        tiers=("memory:2MiB", f"disk:{folder / 'tier'},32MiB") if tiers else (),
        keys=KeyOptions(store=str(folder / "sealing.json")),
    )


async def run(folder: Path, seed: int, *, tiers: bool) -> None:
    """Serve until the process is killed or told to end."""
    options, faults = options_in(folder, tiers=tiers), Faults(seed)

    def build(reply: m.Sink) -> EngineCore:
        parts = default_parts(options)
        parts.files = lambda path: FaultyDirectory(path, faults)
        core = build_core(options, reply, parts)
        faults.awake = True
        return core

    def announce(at: Listening) -> None:
        sys.stdout.write(f"{at.public.url()} {at.admin.url()}\n")
        sys.stdout.flush()

    await serve(
        MessageClient(ThreadTransport(build)),
        TextModel.load(DEMO_MODEL),
        TenantStore.open(folder / "keys.json"),
        ServerOptions(drain_s=0.0),
        public=Bind(),
        admin=Bind(),
        admin_token=ADMIN,
        announce=announce,
    )


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]), tiers=sys.argv[3:] != ["plain"]))
