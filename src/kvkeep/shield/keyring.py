"""The keys in use: unwrapped for at most a minute, in secret memory, in the key process alone."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from kvkeep.errors import KeysGone, KeysUnavailable
from kvkeep.shield import envelope
from kvkeep.shield.issue import EPOCH_S, Issuer, last_of
from kvkeep.shield.keystore import EpochKey, KeyFile, KeyStore, OwnerKeys
from kvkeep.shield.providers.provider import KeyProvider
from kvkeep.shield.secret import SecretRegion

UNWRAPPED_S = 45.0
"""How long an owner's keys are used before the provider is asked again; below a minute."""
REFRESH_S = 30.0
"""Age from which a use asks the provider ahead of time, so that a short outage goes unnoticed."""
PROVIDER_PAUSE_S = 5.0
"""How long a provider that did not answer is left alone."""
MAX_OWNERS = 512
SPARE_SLOTS = 8
CLOCK_SLACK_S = 60.0

_T = TypeVar("_T")


@dataclass(slots=True)
class _Held:
    """One owner's keys, unwrapped: slots of the secret region."""

    key_id: str
    wrapped: bytes
    """The root as the store has it."""
    root: int
    name: int
    since: float
    epochs: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class RingCounts:
    """What happened since the key process began."""

    granted: int = 0
    refused: int = 0
    provider_failures: int = 0
    epochs_begun: int = 0


class Keyring:
    """Answers with page keys and name keys; everything above them stays inside."""

    def __init__(
        self,
        store: KeyStore,
        provider: KeyProvider,
        region: SecretRegion,
        *,
        epoch_s: float = EPOCH_S,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = RingCounts()
        self._store = store
        self._provider = provider
        self._region = region
        self._issuer = Issuer(store, provider, region, wall)
        self._epoch_s = epoch_s
        self._wall = wall
        self._clock = clock
        self._file: KeyFile | None = None
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._budget: dict[tuple[str, int], int] = {}
        self._seen: dict[tuple[str, int], float] = {}
        self._down_until = float("-inf")

    @property
    def provider_down(self) -> bool:
        """Tell whether the provider did not answer lately."""
        return self._clock() < self._down_until

    def owners(self) -> tuple[str, ...]:
        """Return every owner that has keys."""
        return tuple(self._store.read().owners)

    def name_key(self, owner: str) -> tuple[str, bytes]:
        """Return the id of an owner's keys and its name key; makes keys where there are none."""
        held = self._held_of(owner, self._keys_of(owner, make=True))
        return held.key_id, bytes(self._region.view(held.name))

    def fresh(self, owner: str, page_ids: Iterable[bytes]) -> tuple[str, int, list[bytes]]:
        """Return the id of an owner's keys, its newest epoch, and keys of pages to be sealed."""
        ids = list(page_ids)
        keys = self._keys_of(owner, make=True)
        held = self._held_of(owner, keys)
        epoch = last_of(keys)
        if self._is_over(keys, epoch) or not self._reserve(owner, held, epoch, len(ids)):
            epoch = self._begin(owner, held, epoch)
            self._reserve(owner, held, epoch, len(ids))
        key = self._epoch_key(owner, held, epoch)
        self.counts.granted += len(ids)
        return held.key_id, epoch.number, [envelope.page_material(key, i, 0) for i in ids]

    def known(
        self, owner: str, epoch: int, pages: Iterable[tuple[bytes, int]]
    ) -> tuple[str, list[bytes]]:
        """Return keys of pages that were sealed, by page id and generation.

        Raises `KeysGone` where the owner never had this epoch, or has it no more.
        """
        keys = self._keys_of(owner, make=False)
        found = keys.epoch(epoch)
        if found is None:
            self.counts.refused += 1
            raise KeysGone("the keys of a sealed page were destroyed")
        held = self._held_of(owner, keys)
        key = self._epoch_key(owner, held, found)
        made = [envelope.page_material(key, i, generation) for i, generation in pages]
        self.counts.granted += len(made)
        return held.key_id, made

    def newest(self, owner: str) -> int:
        """Return the newest epoch of an owner that has keys."""
        return last_of(self._keys_of(owner, make=False)).number

    def rotate(self, owner: str) -> int:
        """Begin a new epoch for an owner that has keys; returns its number."""
        keys = self._keys_of(owner, make=False)
        return self._begin(owner, self._held_of(owner, keys), last_of(keys)).number

    def forget(self) -> None:
        """Zero every key that is held."""
        while self._held:
            self._drop(next(iter(self._held)))

    def _keys_of(self, owner: str, *, make: bool) -> OwnerKeys:
        """Return an owner's wrapped keys as the store has them now."""
        file = self._store.read()
        self._drop_destroyed(file)
        keys = file.owners.get(owner)
        if keys is not None:
            return keys
        if not make:
            self.counts.refused += 1
            raise KeysGone("the keys of a sealed page were destroyed, or never were")
        return self._asked(lambda: self._issuer.make_owner(owner))

    def _drop_destroyed(self, file: KeyFile) -> None:
        """Forget the keys that the store has no more, or wraps by another root."""
        if file is self._file:
            return
        self._file = file
        for owner, held in list(self._held.items()):
            keys = file.owners.get(owner)
            if keys is None or keys.root != held.wrapped:
                self._drop(owner)

    def _held_of(self, owner: str, keys: OwnerKeys) -> _Held:
        """Return an owner's unwrapped keys; asks the provider where they are old or missing."""
        held, now = self._held.get(owner), self._clock()
        age = float("inf") if held is None else now - held.since
        if held is not None and age < (UNWRAPPED_S if self.provider_down else REFRESH_S):
            self._held.move_to_end(owner)
            return held
        try:
            return self._unwrap(owner, keys)
        except KeysUnavailable:
            if held is None or age >= UNWRAPPED_S:
                self._drop(owner)
                raise
            return held

    def _unwrap(self, owner: str, keys: OwnerKeys) -> _Held:
        self._make_room(owner)
        root = self._region.take()
        name = self._region.take()
        try:
            label = envelope.root_label(owner, keys.key_id)
            into = self._region.view(root)
            self._asked(lambda: self._provider.unwrap(keys.root, label, into))
            label = envelope.name_label(owner, keys.key_id)
            envelope.unwrap(into, keys.name, label, self._region.view(name))
        except BaseException:
            self._region.give(root)
            self._region.give(name)
            raise
        self._drop(owner)
        held = _Held(keys.key_id, keys.root, root, name, self._clock())
        self._held[owner] = held
        return held

    def _asked(self, call: Callable[[], _T]) -> _T:
        """Ask the provider, unless it did not answer a moment ago."""
        if self.provider_down:
            raise KeysUnavailable("the provider of keys did not answer a moment ago")
        try:
            return call()
        except KeysUnavailable:
            self.counts.provider_failures += 1
            self._down_until = self._clock() + PROVIDER_PAUSE_S
            raise

    def _epoch_key(self, owner: str, held: _Held, epoch: EpochKey) -> memoryview:
        slot = held.epochs.get(epoch.number)
        if slot is None:
            self._make_room(owner)
            slot = self._region.take()
            label = envelope.epoch_label(owner, held.key_id, epoch.number)
            try:
                root = self._region.view(held.root)
                envelope.unwrap(root, epoch.wrapped, label, self._region.view(slot))
            except BaseException:
                self._region.give(slot)
                raise
            held.epochs[epoch.number] = slot
        return self._region.view(slot)

    def _make_room(self, but: str) -> None:
        """Drop the keys that were used longest ago, where there are many or memory is short."""
        for owner in list(self._held):
            if len(self._held) < MAX_OWNERS and self._region.free_slots >= SPARE_SLOTS:
                return
            if owner != but:
                self._drop(owner)

    def _drop(self, owner: str) -> None:
        held = self._held.pop(owner, None)
        if held is not None:
            for slot in (held.root, held.name, *held.epochs.values()):
                self._region.give(slot)

    def _is_over(self, keys: OwnerKeys, epoch: EpochKey) -> bool:
        """Tell whether an epoch's time has passed, by either clock, or a clock went back."""
        mark = (keys.key_id, epoch.number)
        watched = self._clock() - self._seen.setdefault(mark, self._clock())
        age = self._wall() - epoch.created
        return max(watched, age) >= self._epoch_s or age < -CLOCK_SLACK_S

    def _begin(self, owner: str, held: _Held, after: EpochKey) -> EpochKey:
        self.counts.epochs_begun += 1
        root = self._region.view(held.root)
        begun = self._issuer.next_epoch(owner, held.wrapped, root, after.number)
        self._seen.setdefault((held.key_id, begun.number), self._clock())
        return begun

    def _reserve(self, owner: str, held: _Held, epoch: EpochKey, pages: int) -> bool:
        """Take pages from what this process reserved of an epoch, durably; False: it is full."""
        mark = (held.key_id, epoch.number)
        left = self._budget.get(mark, 0)
        if left < pages:
            left += self._issuer.reserve(owner, held.key_id, epoch.number)
        self._budget[mark] = max(left - pages, 0)
        return left >= pages
