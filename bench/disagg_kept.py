"""Parts of `kvkeep bench disagg` that ended, kept by commit in `build/disagg`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

import msgspec

from bench.kept import BUILD, Kept

FOLDER: Final = BUILD / "disagg"

T = TypeVar("T", bound=msgspec.Struct)


def kept(name: str, kind: type[T], folder: Path = FOLDER) -> T | None:
    """Return the part of this name that this commit has measured before."""
    return Kept(kind, folder).get(name)


def keep(name: str, part: msgspec.Struct, folder: Path = FOLDER) -> None:
    """Keep a part."""
    Kept(type(part), folder).put(name, part)


def all_kept(folder: Path = FOLDER) -> list[str]:
    """Return the names of what this commit has measured."""
    return Kept(msgspec.Struct, folder).names()
