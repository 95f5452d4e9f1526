"""What whoever leads a cluster gives its workers: each the key of its own pages, and no other."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvkeep.engine.lower import sizes_of
from kvkeep.engine.options import EngineOptions, GivenKeys, KeyOptions
from kvkeep.engine.sealers import (
    attested_worker,
    key_client,
    mode_of,
    store_path,
    unwrap_of,
)
from kvkeep.errors import CheckpointError, SealError
from kvkeep.shield import workers
from kvkeep.shield.folder import is_sealed, read_body
from kvkeep.shield.keys import KeyClient


class Giver:
    """Holds the cluster's key store, which no worker is told how to open."""

    def __init__(self, options: EngineOptions, model: Path) -> None:
        """`options` are those of all workers; raises `ConfigError` where keys can't be had."""
        self._options = options
        self._model = _model_key(options, model)
        self._keys: KeyClient | None = None
        if options.tiers and mode_of(options) not in {"off", "tee"}:
            folder = sizes_of(options.tiers).directory
            self._keys = key_client(options.keys, () if folder is None else (folder,))
            self._keys.start()

    def of(self, worker: str) -> KeyOptions:
        """Return by what a worker seals; raises `SealError` while its key can't be had.

        Raises `ConfigError` under tee where nobody releases keys against attestation.
        """
        options = self._options.keys
        if mode_of(self._options) == "tee":  # it attests itself, and is released a key of its own
            return attested_worker(options, worker)
        given = GivenKeys(
            pages=b"" if self._keys is None else self._keys.worker_key(worker), model=self._model
        )
        store = None if self._keys is None else str(workers.store_of(store_path(options), worker))
        return msgspec.structs.replace(options, provider=None, store=store, given=given)

    def close(self) -> None:
        """End the key process."""
        if self._keys is not None:
            self._keys.close()


def _model_key(options: EngineOptions, model: Path) -> bytes:
    if not is_sealed(model) or mode_of(options) == "tee":
        return b""
    try:
        return bytes(unwrap_of(options.keys)(read_body(model)))
    except SealError as error:
        raise CheckpointError(f"{model} does not open: {error}") from None
