"""A cluster's key stores: one for each worker, under a key that this worker alone is given.

The cluster's own store, which no worker can open, has an owner for each worker. That owner seals
no page: from its name key comes what wraps the roots in the worker's store.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from kvkeep.errors import ConfigError

PROVIDER: Final = "worker"
"""What a worker's store calls whoever wraps its roots."""
_PREFIX: Final = "*worker/"
_FOLDER: Final = ".workers"
_NAME: Final = re.compile(r"[a-z0-9-]{1,64}")


def owner_of(worker: str) -> str:
    """Return the owner in the cluster's store; no account can be called so."""
    if not _NAME.fullmatch(worker):
        raise ConfigError(f"worker: {worker!r} must be of small letters, digits and hyphens")
    return _PREFIX + worker


def is_worker(owner: str) -> bool:
    """Tell whether an owner stands for a worker."""
    return owner.startswith(_PREFIX)


def store_of(store: Path, worker: str) -> Path:
    """Return a worker's store, in a folder beside the cluster's: nodes need that folder alone."""
    return store.with_name(store.name + _FOLDER) / worker


def stores_of(store: Path) -> list[Path]:
    """Return the workers' stores that are there beside the cluster's."""
    folder = store.with_name(store.name + _FOLDER)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if _NAME.fullmatch(path.name) and path.is_file()]


def released_to(worker: str, key: str) -> str:
    """Return what a verifier calls the key that it releases to one worker, beside the cluster's."""
    return f"{key}/{owner_of(worker).removeprefix(_PREFIX)}"


def cluster_of(store: Path) -> tuple[Path, str]:
    """Return the cluster's store beside a worker's, and the worker; see `store_of`."""
    return store.parent.with_name(store.parent.name.removesuffix(_FOLDER)), store.name
