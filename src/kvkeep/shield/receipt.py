"""Destroying a tenant's keys, and the signed receipt of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield import envelope
from kvkeep.shield.envelope import StoreLabels
from kvkeep.shield.keystore import KeyFile, KeyStore, Shredded, StoreKeys
from kvkeep.shield.providers.provider import KeyProvider
from kvkeep.shield.secret import SecretRegion, fill_random

NOT_COVERED = (
    "pages in a running server's memory, until they are purged or it ends",
    "page keys that a running server holds for the call under way",
    "copies of the key store made before, while the provider's key still opens them",
    "blocks that a file system or a disk keeps of the key store's former content",
    "public pages that the tenant's prompts helped to share: they have keys of their own",
    "prompts and answers outside kvkeep: logs, clients, gateways",
)
"""What destroying keys in the key store does not reach; with a provider's own key gone, the third
line is left out.
"""
OWN_COPIES = NOT_COVERED[2]


class Destroyed(msgspec.Struct, frozen=True, kw_only=True):
    """One owner's destroyed keys."""

    owner: str
    key_id: str
    epochs: int


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What a receipt says."""

    tenant: str
    store_id: str
    provider: str
    at: float
    destroyed: tuple[Destroyed, ...]
    provider_destroyed: bool
    """Whether the provider destroyed a key that it kept for this tenant alone."""
    not_covered: tuple[str, ...]


class SignedReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """A statement as it was signed, by the key store's Ed25519 key."""

    statement: bytes
    public: bytes
    signature: bytes | None
    """None where the provider did not answer: the keys are destroyed all the same."""

    def check(self, public: bytes | None = None) -> Statement:
        """Return the statement; raises `SealError` unless it is signed, by this key if given."""
        if self.signature is None:
            raise SealError("the receipt is not signed: the provider did not answer then")
        if public is not None and public != self.public:
            raise SealError("the receipt is signed by another key store")
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(self.signature, self.statement)
            return msgspec.json.decode(self.statement, type=Statement)
        except (InvalidSignature, ValueError, msgspec.MsgspecError):
            raise SealError("the receipt was changed, or signed by another key") from None


def read_receipt(path: Path) -> SignedReceipt:
    """Return a receipt's file; raises `ConfigError` where it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SignedReceipt)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"receipt: {path} can't be read as one: {error}") from None


def open_store(store: KeyStore, provider: KeyProvider, kind: str, region: SecretRegion) -> bytes:
    """Return the key by which a store's owners are filed; gives a new store its own keys.

    Raises `ConfigError` where the provider is not the one the store was made with.
    """
    slot = region.random()
    try:
        view = region.view(slot)
        with store.editing() as put:
            file = store.read()
            labels = envelope.store_labels(file.store_id)
            if file.own is None:
                own = _new_keys(provider, labels, view)
                put(msgspec.structs.replace(file, own=own, provider=kind))
                return bytes(view)
        try:
            provider.unwrap(file.own.shelf, labels.shelf, view)
        except KeysUnavailable:
            raise
        except SealError:
            raise ConfigError(
                f"shield_keys: this provider's key does not open {store.path}, made with"
                f" {file.provider}; name the one it was made with"
            ) from None
        return bytes(view)
    finally:
        region.give(slot)


def _new_keys(provider: KeyProvider, labels: StoreLabels, view: memoryview) -> StoreKeys:
    """Return new keys; `view` is random and holds the shelf key afterwards."""
    public = Ed25519PrivateKey.from_private_bytes(view).public_key().public_bytes_raw()
    signing = provider.wrap(view, labels.signing)
    fill_random(view)
    return StoreKeys(public=public, signing=signing, shelf=provider.wrap(view, labels.shelf))


def shred(
    tenant: str,
    store: KeyStore,
    provider: KeyProvider,
    region: SecretRegion,
    wall: Callable[[], float] = time.time,
    elsewhere: Sequence[Destroyed] = (),
) -> bytes:
    """Destroy a tenant's keys in a store; returns the signed receipt.

    `elsewhere` are those that were destroyed in other stores and belong on it too. Raises
    `ConfigError` where the tenant has no keys.
    """
    gone = destroy(tenant, store, wall)
    if not (gone or elsewhere):
        raise ConfigError(f"name: there are no keys of a tenant {tenant} in {store.path}")
    file = store.read()
    reached = not elsewhere and _destroyed_by(provider, gone)
    statement = Statement(
        tenant=tenant,
        store_id=file.store_id,
        provider=file.provider,
        at=wall(),
        destroyed=(*gone, *elsewhere),
        provider_destroyed=reached,
        not_covered=tuple(n for n in NOT_COVERED if not (reached and n == OWN_COPIES)),
    )
    return _signed(msgspec.json.encode(statement), file, provider, region)


def destroy(
    tenant: str, store: KeyStore, wall: Callable[[], float] = time.time
) -> tuple[Destroyed, ...]:
    """Destroy a tenant's wrapped roots, and its gateway's tenants', in one store."""
    with store.editing() as put:
        file = store.read()
        owners = file.of_tenant(tenant)
        if not owners:
            return ()
        gone = tuple(
            Shredded(
                owner=owner,
                key_id=file.owners[owner].key_id,
                at=wall(),
                last_epoch=file.last_epoch(owner),
            )
            for owner in owners
        )
        left = {o: k for o, k in file.owners.items() if o not in owners}
        shredded = tuple(s for s in file.shredded if s.owner not in owners) + gone
        rest = msgspec.structs.replace(file, owners=left, shredded=shredded)
        store.scrub_after(lambda: put(rest))
    return tuple(
        Destroyed(owner=g.owner, key_id=g.key_id, epochs=len(file.owners[g.owner].epochs))
        for g in gone
    )


def _destroyed_by(provider: KeyProvider, gone: tuple[Destroyed, ...]) -> bool:
    try:
        done = [provider.destroy(envelope.root_label(g.owner, g.key_id)) for g in gone]
    except SealError:
        return False
    return all(done)


def _signed(statement: bytes, file: KeyFile, provider: KeyProvider, region: SecretRegion) -> bytes:
    if file.own is None:
        return msgspec.json.encode(SignedReceipt(statement=statement, public=b"", signature=None))
    slot = region.take()
    signature: bytes | None
    try:
        view = region.view(slot)
        provider.unwrap(file.own.signing, envelope.store_labels(file.store_id).signing, view)
        signature = Ed25519PrivateKey.from_private_bytes(view).sign(statement)
    except SealError:
        signature = None
    finally:
        region.give(slot)
    receipt = SignedReceipt(statement=statement, public=file.own.public, signature=signature)
    return msgspec.json.encode(receipt)
