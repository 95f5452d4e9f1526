"""Parts of `kvkeep bench disagg` that ended, kept by commit in `build/disagg`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench.disagg_load import Part
from bench.kept import BUILD, Kept

FOLDER: Final = BUILD / "disagg"


def kept(name: str, folder: Path = FOLDER) -> Part | None:
    """Return the part of this name that this commit has measured before."""
    return Kept(Part, folder).get(name)


def keep(name: str, part: Part, folder: Path = FOLDER) -> None:
    """Keep a part."""
    Kept(Part, folder).put(name, part)


def all_kept(folder: Path = FOLDER) -> list[str]:
    """Return the names of what this commit has measured."""
    return Kept(Part, folder).names()
