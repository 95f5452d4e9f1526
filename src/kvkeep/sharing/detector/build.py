"""What tells one build of the detector from another: its code, and the libraries it asks."""

from __future__ import annotations

import hashlib
import unicodedata
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

LIBRARIES: Final = ("google-re2", "phonenumberslite", "python-stdnum")
_HERE: Final = Path(__file__).parent


@cache
def build_digest(folder: Path = _HERE) -> str:
    """Return a digest of a folder's code and of what it relies on.

    The same rules find other things under other code: votes must not outlive that either.
    """
    digest = hashlib.sha256(unicodedata.unidata_version.encode())
    for name in LIBRARIES:
        digest.update(f"\n{name} {version(name)}".encode())
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
