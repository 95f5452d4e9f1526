"""Edits of the key store: new owners, epochs and wrappings; each is one durable replacement.

Whatever ends a process between two of them leaves every key that a page was sealed under
readable: a key is used only after the file that holds it is in place.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import msgspec

from kvkeep.errors import KeysGone, KeysUnavailable
from kvkeep.shield import envelope
from kvkeep.shield.keystore import EpochKey, KeyStore, OwnerKeys
from kvkeep.shield.providers.provider import KeyProvider
from kvkeep.shield.secret import SecretRegion

EPOCH_S = 86_400.0
EPOCH_PAGES = 1 << 28
"""Most pages sealed under one epoch's key."""
RESERVED_PAGES = 1 << 20
"""Pages that a key process reserves at a time."""


def last_of(keys: OwnerKeys) -> EpochKey:
    """Return an owner's newest epoch."""
    return max(keys.epochs, key=lambda epoch: epoch.number)


class Issuer:
    """Makes and rewraps keys in one store."""

    def __init__(
        self,
        store: KeyStore,
        provider: KeyProvider,
        region: SecretRegion,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._provider = provider
        self._region = region
        self._wall = wall

    def make_owner(self, owner: str) -> OwnerKeys:
        """Return an owner's keys: those that are there by now, or new ones."""
        key_id = secrets.token_hex(16)
        root, name = self._region.random(), self._region.random()
        try:
            view = self._region.view(root)
            label = envelope.name_label(owner, key_id)
            made = OwnerKeys(
                key_id=key_id,
                root=self._provider.wrap(view, envelope.root_label(owner, key_id)),
                name=envelope.wrap(view, self._region.view(name), label),
                created=self._wall(),
            )
            with self._store.editing() as put:
                file = self._store.read()
                if owner in file.owners:
                    return file.owners[owner]
                number = file.last_epoch(owner) + 1
                made = self._with_epoch(made, owner, view, number)
                put(file.with_owner(owner, made))
            return made
        finally:
            self._region.give(root)
            self._region.give(name)

    def next_epoch(self, owner: str, wrapped: bytes, root: memoryview, after: int) -> EpochKey:
        """Return the epoch after one: that which is there by now, or a new one.

        `root` is the owner's, `wrapped` how the store had it; another one there raises
        `KeysUnavailable`, since nothing new may be wrapped by a root that was renewed.
        """
        with self._store.editing() as put:
            file = self._store.read()
            keys = file.owners.get(owner)
            if keys is None or keys.root != wrapped:
                raise KeysUnavailable("the owner's keys were renewed or destroyed meanwhile")
            if last_of(keys).number > after:
                return last_of(keys)
            keys = self._with_epoch(keys, owner, root, file.last_epoch(owner) + 1)
            put(file.with_owner(owner, keys))
        return last_of(keys)

    def reserve(self, owner: str, key_id: str, number: int) -> int:
        """Return how many more pages may be sealed under an epoch; 0: it has sealed all it may.

        What is reserved and not used when a process ends is lost, so that no count falls back.
        """
        with self._store.editing() as put:
            file = self._store.read()
            keys = file.owners.get(owner)
            if keys is None or keys.key_id != key_id:
                raise KeysGone("the owner's keys were destroyed meanwhile")
            epoch = keys.epoch(number)
            if epoch is None or epoch.pages + RESERVED_PAGES > EPOCH_PAGES:
                return 0
            more = msgspec.structs.replace(epoch, pages=epoch.pages + RESERVED_PAGES)
            epochs = tuple(more if e.number == number else e for e in keys.epochs)
            put(file.with_owner(owner, msgspec.structs.replace(keys, epochs=epochs)))
        return RESERVED_PAGES

    def retire(self, owner: str, before: int) -> int:
        """Destroy an owner's keys of the epochs before one, never its newest; returns how many.

        Raises `KeysGone` where the owner has no keys.
        """
        with self._store.editing() as put:
            file = self._store.read()
            keys = file.owners.get(owner)
            if keys is None:
                raise KeysGone("the owner has no keys")
            newest = last_of(keys).number
            kept = tuple(e for e in keys.epochs if e.number >= min(before, newest))
            left = file.with_owner(owner, msgspec.structs.replace(keys, epochs=kept))
            if len(kept) < len(keys.epochs):
                self._store.scrub_after(lambda: put(left))
        return len(keys.epochs) - len(kept)

    def renew_root(self, owner: str) -> None:
        """Give an owner a new root, which wraps its keys; pages stay as they are."""
        old, new, inner = self._region.take(), self._region.random(), self._region.take()
        try:
            views = [self._region.view(slot) for slot in (old, new, inner)]
            with self._store.editing() as put:
                file = self._store.read()
                keys = file.owners[owner]
                label = envelope.root_label(owner, keys.key_id)
                self._provider.unwrap(keys.root, label, views[0])
                put(file.with_owner(owner, self._rewrapped(owner, keys, *views)))
        finally:
            for slot in (old, new, inner):
                self._region.give(slot)

    def rewrap_all(self, to: KeyProvider, kind: str) -> int:
        """Wrap every root by another provider, or by the same one's newest key; returns how many.

        The old provider's key is no longer needed once this returns.
        """
        slot = self._region.take()
        try:
            view = self._region.view(slot)
            with self._store.editing() as put:
                file = self._store.read()
                owners = {
                    owner: msgspec.structs.replace(
                        keys,
                        root=self._moved(
                            to, keys.root, envelope.root_label(owner, keys.key_id), view
                        ),
                    )
                    for owner, keys in file.owners.items()
                }
                own = file.own
                if own is not None:
                    labels = envelope.store_labels(file.store_id)
                    own = msgspec.structs.replace(
                        own,
                        signing=self._moved(to, own.signing, labels.signing, view),
                        shelf=self._moved(to, own.shelf, labels.shelf, view),
                    )
                put(msgspec.structs.replace(file, owners=owners, own=own, provider=kind))
            return len(owners)
        finally:
            self._region.give(slot)

    def _moved(self, to: KeyProvider, wrapped: bytes, label: bytes, view: memoryview) -> bytes:
        if to is self._provider:
            return to.rewrap(wrapped, label)
        self._provider.unwrap(wrapped, label, view)
        return to.wrap(view, label)

    def _rewrapped(
        self, owner: str, keys: OwnerKeys, old: memoryview, new: memoryview, inner: memoryview
    ) -> OwnerKeys:
        def again(wrapped: bytes, label: bytes) -> bytes:
            envelope.unwrap(old, wrapped, label, inner)
            return envelope.wrap(new, inner, label)

        return msgspec.structs.replace(
            keys,
            root=self._provider.wrap(new, envelope.root_label(owner, keys.key_id)),
            name=again(keys.name, envelope.name_label(owner, keys.key_id)),
            epochs=tuple(
                msgspec.structs.replace(
                    e, wrapped=again(e.wrapped, envelope.epoch_label(owner, keys.key_id, e.number))
                )
                for e in keys.epochs
            ),
        )

    def _with_epoch(self, keys: OwnerKeys, owner: str, root: memoryview, number: int) -> OwnerKeys:
        slot = self._region.random()
        try:
            label = envelope.epoch_label(owner, keys.key_id, number)
            wrapped = envelope.wrap(root, self._region.view(slot), label)
        finally:
            self._region.give(slot)
        epoch = EpochKey(number=number, wrapped=wrapped, created=self._wall())
        return msgspec.structs.replace(keys, epochs=(*keys.epochs, epoch))
