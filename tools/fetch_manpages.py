"""Unpack Debian's translated manual pages under build/manpages: `python -m tools.fetch_manpages`.

Needs apt and the network once. `kvkeep bench detect` reads them as real text; without them it reads
what the machine has installed under /usr/share/man.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

PACKAGES: Final = tuple(f"manpages-{lang}" for lang in ("de", "fr", "es", "it", "ja", "zh", "uk"))
TARGET: Final = Path(__file__).resolve().parents[1] / "build" / "manpages"


def main() -> int:
    """Download, unpack, keep the pages alone."""
    with TemporaryDirectory() as folder:
        subprocess.run(("apt-get", "download", "-q", *PACKAGES), cwd=folder, check=True)
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(("dpkg", "-x", str(package), str(TARGET)), check=True)
            print(package.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
