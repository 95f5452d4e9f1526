"""A key store opened for its operator, in a process that ends soon after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvkeep.errors import ConfigError, KeysUnavailable
from kvkeep.shield import envelope, workers
from kvkeep.shield.issue import Issuer
from kvkeep.shield.keyring import Keyring
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.providers.local import LocalProvider
from kvkeep.shield.providers.make import make_provider
from kvkeep.shield.providers.provider import KeyProvider, ProviderSpec
from kvkeep.shield.receipt import Destroyed, destroy, open_store, shred
from kvkeep.shield.secret import SecretRegion

SLOTS = 8192
"""Of 32 bytes: 256 KiB, well below the memory that a user may lock."""
FEW_SLOTS = 16
"""To look at a store and close it again."""


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """What an operator does with keys; running servers see each change at once."""

    store: KeyStore
    provider: KeyProvider
    region: SecretRegion
    shelf: bytes

    def rotate(self, owner: str) -> int:
        """Begin a new epoch for an owner; returns its number."""
        return Keyring(self.store, self.provider, self.region).rotate(owner)

    def retire(self, owner: str, before: int) -> int:
        """Destroy an owner's keys of the epochs before one; returns how many."""
        return Issuer(self.store, self.provider, self.region).retire(owner, before)

    def renew_root(self, owner: str) -> None:
        """Give an owner a new root; no page is sealed anew."""
        Issuer(self.store, self.provider, self.region).renew_root(owner)

    def move(self, to: ProviderSpec | None = None) -> int:
        """Wrap every root by another provider, or by the newest key of this one; how many."""
        issuer, kind = Issuer(self.store, self.provider, self.region), self.store.read().provider
        if to is None:
            return issuer.rewrap_all(self.provider, kind)
        if kind == workers.PROVIDER:
            raise ConfigError(
                f"to: the roots of {self.store.path} are a worker's; rewrap the cluster's store"
            )
        return issuer.rewrap_all(make_provider(to, self.region), to.kind)

    def shred(self, tenant: str) -> bytes:
        """Destroy a tenant's keys, also in the stores of a cluster's workers; returns the receipt.

        A worker's store that is not there has no keys.
        """
        elsewhere: list[Destroyed] = []
        for path in workers.stores_of(self.store.path):
            elsewhere += destroy(tenant, KeyStore(path))
        return shred(tenant, self.store, self.provider, self.region, elsewhere=elsewhere)

    def worker_key(self, worker: str) -> bytes:
        """Return what wraps the roots in a worker's store; makes both where they are not there.

        Raises `ConfigError` where that store was made under another key.
        """
        ring = Keyring(self.store, self.provider, self.region)
        try:
            _, name_key = ring.name_key(workers.owner_of(worker))
        finally:
            ring.forget()
        key = envelope.worker_key(name_key, worker)
        with opened_by_worker(workers.store_of(self.store.path, worker), key, slots=FEW_SLOTS):
            return key


@contextmanager
def opened(path: Path, spec: ProviderSpec) -> Iterator[OpenedStore]:
    """Open a key store, made where there is none; raises `ConfigError` where it can't be used.

    The process should forbid dumps of itself first.
    """
    with _opened(path, spec.kind, partial(make_provider, spec), SLOTS) as store:
        yield store


@contextmanager
def opened_by_worker(path: Path, key: bytes, *, slots: int = SLOTS) -> Iterator[OpenedStore]:
    """Open a worker's store by the key that it was given; see `opened`."""
    with _opened(path, workers.PROVIDER, partial(LocalProvider.given, key), slots) as store:
        yield store


@contextmanager
def _opened(
    path: Path, kind: str, make: Callable[[SecretRegion], KeyProvider], slots: int
) -> Iterator[OpenedStore]:
    region = SecretRegion(slots)
    try:
        store = KeyStore(path)
        provider = make(region)
        store.create()
        try:
            shelf = open_store(store, provider, kind, region)
        except KeysUnavailable as error:
            raise ConfigError(
                f"shield_keys: {kind} can't be used now: {error}; see that it runs and"
                " answers this user"
            ) from None
        yield OpenedStore(store, provider, region, shelf)
    finally:
        region.close()
