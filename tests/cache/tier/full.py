"""Fills a tier on a file system of its own, which is made read-only then; tells what it found.

Run in a mount namespace of its own: `python -m tests.cache.tier.full DIR`, DIR a small tmpfs.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import msgspec

from kvkeep.cache.tier.files import Directory
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.errors import ConfigError
from tests.cache.tier.rigs import Rig, layers_of, page

PAGES = 1500
"""Of a kilobyte; the file system has room for two thirds of them."""


class Found(msgspec.Struct, frozen=True):
    """What became of pages on a disk, and what was said of it."""

    held: int
    wrong: int
    missed: int
    errors: dict[str, int]


class Told(msgspec.Struct, frozen=True):
    """The outcome."""

    full: Found
    after: Found
    refused: str


def look(rig: Rig) -> Found:
    """Fetch every page that the tier says it holds."""
    held = rig.held([page(number) for number in range(PAGES)])
    got = [rig.fetch(page(number)) for number in held]
    wrong = sum(one not in (None, layers_of(page(n))) for n, one in zip(held, got, strict=True))
    return Found(len(held), wrong, got.count(None), dict(rig.use().errors))


def main(folder: Path) -> None:
    """Fill the disk, read it, start on it again, make it read-only and try to."""
    rig = Rig(TierSizes(disk_bytes=64 << 20), disk=Directory(folder / "tier"))  # type: ignore[arg-type]
    for number in range(PAGES):
        rig.store(page(number))
        rig.settle()
    full = look(rig)
    rig.tier.close(5.0)
    again = Rig(rig.sizes, disk=Directory(folder / "tier"))  # type: ignore[arg-type]
    after = look(again)
    again.tier.close(5.0)
    refused = read_only(folder)
    sys.stdout.buffer.write(msgspec.json.encode(Told(full, after, refused)))


def read_only(folder: Path) -> str:
    """Make the file system read-only; return what a start on it says."""
    gc.collect()  # segments that are held open for writing
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        Directory(folder / "tier")
    except ConfigError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
