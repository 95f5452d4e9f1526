"""Audits that ended, kept by commit: a run of minutes that was cut off goes on where it was.

Nothing is kept of a tree that differs from its commit. Delete the folder to measure anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from bench import harness
from kvkeep.audit import Report
from kvkeep.cli.console import NOTES
from kvkeep.files import replace_file

FOLDER: Final = Path(__file__).parents[1] / "build" / "audits"


def kept(name: str, measure: Callable[[], Report], folder: Path = FOLDER) -> Report:
    """Return the audit of this name that this commit has made before, or make it."""
    commit = harness.commit()
    path = folder / commit / f"{name}.json"
    if path.exists():
        NOTES.print(f"{name}: taken from {path}")
        return msgspec.json.decode(path.read_bytes(), type=Report)
    report = measure()
    if not commit.endswith("-dirty"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, msgspec.json.encode(report))
    return report
