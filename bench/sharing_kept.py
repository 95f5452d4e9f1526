"""Audits that ended, kept by commit in `build/audits`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.kept import BUILD, Kept
from kvkeep.audit import Report

FOLDER: Final = BUILD / "audits"


def kept(name: str, measure: Callable[[], Report], folder: Path = FOLDER) -> Report:
    """Return the audit of this name that this commit has made before, or make it."""
    return Kept(Report, folder).got(name, measure)
