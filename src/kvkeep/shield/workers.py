"""A cluster's key stores: one for each worker, under a key that this worker alone is given.

The cluster's own store, which no worker can open, has an owner for each worker. That owner seals
no page: from its name key comes what wraps the roots in the worker's store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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


def workers_of(owners: Iterable[str]) -> tuple[str, ...]:
    """Return the workers among a store's owners."""
    return tuple(owner.removeprefix(_PREFIX) for owner in sorted(owners) if is_worker(owner))


def store_of(store: Path, worker: str) -> Path:
    """Return a worker's store, in a folder beside the cluster's: nodes need that folder alone."""
    return store.with_name(store.name + _FOLDER) / worker


def cluster_of(store: Path) -> tuple[Path, str]:
    """Return the cluster's store beside a worker's, and the worker; see `store_of`."""
    return store.parent.with_name(store.parent.name.removesuffix(_FOLDER)), store.name
