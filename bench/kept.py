"""Parts of a benchmark that ended, kept by commit: a run that was cut off goes on where it was.

Nothing is kept of a tree that differs from its commit. Delete the folder to measure anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from bench import harness
from kvkeep.cli.console import NOTES
from kvkeep.files import replace_file

BUILD: Final = Path(__file__).parents[1] / "build"

T = TypeVar("T")


@dataclass(frozen=True)
class Kept(Generic[T]):
    """Parts of one type in a folder."""

    kind: type[T]
    folder: Path

    def get(self, name: str) -> T | None:
        """Return the part of this name that this commit has measured before."""
        path = self._path(name)
        if not path.exists():
            return None
        NOTES.print(f"{name}: taken from {path}")
        return msgspec.json.decode(path.read_bytes(), type=self.kind)

    def put(self, name: str, part: T) -> None:
        """Keep a part, where the tree is that of a commit."""
        path = self._path(name)
        if not harness.commit().endswith("-dirty"):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, msgspec.json.encode(part))

    def got(self, name: str, measure: Callable[[], T]) -> T:
        """Return the part of this name that this commit has measured before, or measure it."""
        found = self.get(name)
        if found is None:
            found = measure()
            self.put(name, found)
        return found

    def names(self) -> list[str]:
        """Return the names of what this commit has measured."""
        return sorted(path.stem for path in (self.folder / harness.commit()).glob("*.json"))

    def _path(self, name: str) -> Path:
        return self.folder / harness.commit() / f"{name}.json"
