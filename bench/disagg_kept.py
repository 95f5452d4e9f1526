"""Parts of `kvkeep bench disagg` that ended, kept by commit: a run that was cut off goes on.

Nothing is kept of a tree that differs from its commit. Delete the folder to measure anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from bench import harness
from bench.disagg_load import Part
from kvkeep.cli.console import NOTES
from kvkeep.files import replace_file

FOLDER: Final = Path(__file__).parents[1] / "build" / "disagg"


def kept(name: str, folder: Path = FOLDER) -> Part | None:
    """Return the part of this name that this commit has measured before."""
    path = folder / harness.commit() / f"{name}.json"
    if not path.exists():
        return None
    NOTES.print(f"{name}: taken from {path}")
    return msgspec.json.decode(path.read_bytes(), type=Part)


def keep(name: str, part: Part, folder: Path = FOLDER) -> None:
    """Keep a part, where the tree is that of a commit."""
    commit = harness.commit()
    if not commit.endswith("-dirty"):
        path = folder / commit / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, msgspec.json.encode(part))


def all_kept(folder: Path = FOLDER) -> list[str]:
    """Return the names of what this commit has measured."""
    return sorted(path.stem for path in (folder / harness.commit()).glob("*.json"))
