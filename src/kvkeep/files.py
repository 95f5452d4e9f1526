"""Files that are replaced as a whole or left as they were."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PRIVATE = 0o600
READABLE = 0o644


def replace_file(path: Path, raw: bytes, mode: int = PRIVATE) -> None:
    """Write a sibling that is on disk before it takes the file's place, durably.

    The sibling is its owner's alone from its first byte. Raises `OSError`.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    fresh = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        fresh.replace(path)
        sync_folder(path.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make what a folder names durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
