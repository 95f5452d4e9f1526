"""A process whose pages go to a disk and a service, and that kills itself at a disk operation.

`python -m tests.cache.tier.killed_tier DIR PORT NUMBER`: prints each page once it is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvkeep.cache.tier.files import Files
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.remote import RemoteFrames, client_of
from tests.cache.tier.killed import Countdown, MortalDirectory
from tests.cache.tier.rigs import RECORD, Rig, layers_of, page

PAGES = 60
SIZES = TierSizes(0, 64 * RECORD, 1 << 20)
"""Of whose disk an owner with half of it may fill 24 records."""
SPACE = b"killed-tier-1234"


def rig(files: Files, port: int) -> Rig:
    """Return a tier over both."""
    remote = client_of(f"redis://127.0.0.1:{port}/0")
    return Rig(SIZES, disk=files, remote=lambda: RemoteFrames(remote, SPACE))  # type: ignore[arg-type]


def main(directory: str, port: str, number: str) -> None:
    """Write pages one by one, and read an old one now and then, which rises."""
    made = rig(MortalDirectory(Path(directory), Countdown(int(number))), int(port))
    for one in range(PAGES):
        made.store(page(one))
        made.settle()
        sys.stdout.write(f"{one}\n")
        sys.stdout.flush()
        if one % 5 == 0 and made.fetch(page(one // 2)) != layers_of(page(one // 2)):
            sys.exit("a page is another")
    made.tier.close(5.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
