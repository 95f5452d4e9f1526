"""Say which of the known keys an unknown one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from kvkeep.errors import ConfigError


def nearest(key: str, valid: Iterable[str]) -> str:
    """Return the valid key that looks most like `key`."""
    plain = key.replace("-", "_")
    return max(sorted(valid), key=lambda name: difflib.SequenceMatcher(None, plain, name).ratio())


def check_keys(keys: Iterable[str], where: str, valid: Iterable[str]) -> None:
    """Raise `ConfigError` for the first key that is no setting, naming the nearest one."""
    known = set(valid)
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"{where} has an unknown key {key!r}; the nearest one is {nearest(key, known)!r}"
            )
