"""A key store opened for its operator, in a process that ends soon after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvkeep.errors import ConfigError, KeysUnavailable
from kvkeep.shield.issue import Issuer
from kvkeep.shield.keyring import Keyring
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.providers.make import make_provider
from kvkeep.shield.providers.provider import KeyProvider, ProviderSpec
from kvkeep.shield.receipt import open_store, shred
from kvkeep.shield.secret import SecretRegion

SLOTS = 8192
"""Of 32 bytes: 256 KiB, well below the memory that a user may lock."""


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
        issuer = Issuer(self.store, self.provider, self.region)
        if to is None:
            return issuer.rewrap_all(self.provider, self.store.read().provider)
        return issuer.rewrap_all(make_provider(to, self.region), to.kind)

    def shred(self, tenant: str) -> bytes:
        """Destroy a tenant's keys; returns the receipt."""
        return shred(tenant, self.store, self.provider, self.region)


@contextmanager
def opened(path: Path, spec: ProviderSpec) -> Iterator[OpenedStore]:
    """Open a key store, made where there is none; raises `ConfigError` where it can't be used.

    The process should forbid dumps of itself first.
    """
    region = SecretRegion(SLOTS)
    try:
        store = KeyStore(path)
        provider = make_provider(spec, region)
        store.create()
        try:
            shelf = open_store(store, provider, spec.kind, region)
        except KeysUnavailable as error:
            raise ConfigError(
                f"shield_keys: {spec.kind} can't be used now: {error}; see that it runs and"
                " answers this user"
            ) from None
        yield OpenedStore(store, provider, region, shelf)
    finally:
        region.close()
