"""Build each client's own environment under .peers/: `python -m tools.clients.build [NAME ...]`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tools.peers.build import ROOT, TORCH, Recipe, build

RECIPES: Final = {
    "lm-eval": Recipe(
        installs=(("lm_eval[api]==0.4.13", "transformers==5.23.0"),),
        gigabytes=1.5,
        modules=("lm_eval", "transformers", "aiohttp"),
    ),
    "guidellm": Recipe(
        installs=(TORCH, ("guidellm==0.8.1", "transformers==5.23.0")),
        gigabytes=3.0,
        modules=("guidellm",),
    ),
}


def command(name: str, program: str) -> Path:
    """Return where a client's program lies."""
    return ROOT / name / "bin" / program


def main() -> int:
    """Build the clients named, or all."""
    names = sys.argv[1:] or list(RECIPES)
    for name in names:
        if name not in RECIPES:
            print(f"unknown client {name}: choose from {', '.join(RECIPES)}", file=sys.stderr)
            return 1
        try:
            build(name, RECIPES[name])
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name}: failed, {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
