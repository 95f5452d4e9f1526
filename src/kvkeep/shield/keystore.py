"""The one file of wrapped keys: replaced as a whole, mode 0600, never in a tier's directory."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kvkeep.errors import ConfigError
from kvkeep.files import sync_folder

FORMAT = 1
OPEN_TO_OTHERS = 0o077


class EpochKey(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch's key, wrapped by its owner's root."""

    number: int
    wrapped: bytes
    created: float
    pages: int = 0
    """Pages that key processes have reserved to seal under it."""


class OwnerKeys(msgspec.Struct, frozen=True, kw_only=True):
    """One owner's keys; the root is wrapped by the provider, all others by the root."""

    key_id: str
    root: bytes
    name: bytes
    created: float
    epochs: tuple[EpochKey, ...] = ()

    def epoch(self, number: int) -> EpochKey | None:
        """Return the epoch of this number."""
        return next((e for e in self.epochs if e.number == number), None)


class Shredded(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of destroyed keys: that they were, and the epoch numbers not to use again."""

    owner: str
    key_id: str
    at: float
    last_epoch: int


class StoreKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs to the store and no owner, wrapped by the provider."""

    public: bytes
    """Of the key that signs receipts (Ed25519)."""
    signing: bytes
    shelf: bytes
    """Of the key by which owners are filed; it outlives theirs."""


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    version: int = FORMAT
    store_id: str
    provider: str = ""
    """Kind of the provider that wraps the roots."""
    own: StoreKeys | None = None
    """None: the store was never opened with a provider."""
    owners: dict[str, OwnerKeys] = {}
    shredded: tuple[Shredded, ...] = ()

    def last_epoch(self, owner: str) -> int:
        """Return the highest epoch number that the owner ever had; 0: none."""
        keys = self.owners.get(owner)
        numbers = [e.number for e in keys.epochs] if keys else []
        return max(
            [*numbers, *(s.last_epoch for s in self.shredded if s.owner == owner)], default=0
        )

    def of_tenant(self, name: str) -> tuple[str, ...]:
        """Return the owners that belong to a tenant: itself, and a gateway's own tenants."""
        return tuple(o for o in self.owners if o == name or o.startswith(f"{name}/"))

    def with_owner(self, owner: str, keys: OwnerKeys) -> KeyFile:
        """Return the file with an owner's keys put in or replaced."""
        return msgspec.structs.replace(self, owners=self.owners | {owner: keys})


Stamp = tuple[int, int, int]


class KeyStore:
    """Reads and edits a key file; several processes may hold one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: Stamp | None = None
        self._file: KeyFile | None = None

    def create(self) -> None:
        """Make the file where there is none; raises `ConfigError` where it can't be used."""
        with self.editing():
            pass

    def read(self) -> KeyFile:
        """Return the file as it is now; raises `ConfigError` where it can't be used."""
        stamp = self._look()
        if self._file is not None and stamp == self._stamp:
            return self._file
        try:
            self._file = self._parse(self._bytes())
        except ConfigError:
            if self._look() == stamp:
                raise
            return self.read()  # it was replaced, and scrubbed, while it was read
        self._stamp = stamp
        return self._file

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from making or changing the file and what lies beside it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(
                self.path.with_name(self.path.name + ".lock"),
                os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
        except OSError as error:
            raise ConfigError(
                f"shield_store: can't write beside {self.path}: {error.strerror}"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def editing(self) -> Iterator[Callable[[KeyFile], None]]:
        """Hold the lock and hand out a function that puts a changed file in place, durably.

        What is read inside is what the change must start from.
        """
        with self.locked():
            if not self.path.exists():
                self._put(KeyFile(store_id=secrets.token_hex(16)))
            yield self._put

    def scrub_after(self, change: Callable[[], None]) -> None:
        """Make a change, then overwrite what the file held before it; inside `editing`.

        A file system that writes elsewhere, and a disk, may keep the old blocks all the same.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(handle).st_size
            change()
            os.pwrite(handle, bytes(size), 0)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _look(self) -> Stamp:
        """Return what changes with the file; raises `ConfigError` where others may read it."""
        try:
            found = self.path.lstat()
        except OSError as error:
            raise self._unreadable(error) from None
        mode = found.st_mode & 0o777
        if mode & OPEN_TO_OTHERS:
            raise ConfigError(f"shield_store: {self.path} has mode {mode:04o}; run chmod 600 on it")
        if found.st_uid != os.geteuid():
            raise ConfigError(f"shield_store: {self.path} belongs to another user; run chown on it")
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> ConfigError:
        return ConfigError(f"shield_store: can't read {self.path}: {error.strerror}")

    def _parse(self, raw: bytes) -> KeyFile:
        try:
            file = msgspec.json.decode(raw, type=KeyFile)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"shield_store: {self.path} is no key store: {error}; restore it from a copy"
            ) from None
        if file.version != FORMAT:
            raise ConfigError(
                f"shield_store: {self.path} has format {file.version}, this kvkeep reads {FORMAT}"
            )
        return file

    def _put(self, file: KeyFile) -> None:
        """Write a sibling (mode 0600 from its first byte), then rename it over the file.

        The sibling has one name: what a killed process leaves, the next edit overwrites, so that
        no wrapped key outlives its destruction beside the file.
        """
        raw = msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"
        sibling = self.path.with_name(self.path.name + ".new")
        try:
            sibling.unlink(missing_ok=True)
            handle = os.open(sibling, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as writer:
                writer.write(raw)
                writer.flush()
                os.fsync(handle)
            sibling.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise ConfigError(f"shield_store: can't write {self.path}: {error.strerror}") from None


def refuse_inside(store: Path, folders: Iterable[Path]) -> None:
    """Raise `ConfigError` where the key store lies in a folder of sealed pages.

    A copy of that folder would hold the pages and their wrapped keys together.
    """
    for folder in folders:
        if store.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"shield_store: {store} lies in the tier's directory {folder};"
                " put it where backups of that directory don't reach"
            )
