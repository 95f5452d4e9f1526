"""A wrapping key that this machine holds: in a file, a variable or an open file."""

from __future__ import annotations

import os
from pathlib import Path

from kvkeep.errors import ConfigError
from kvkeep.shield import envelope
from kvkeep.shield.envelope import KEY_BYTES
from kvkeep.shield.secret import SecretRegion

HEX_CHARS = 2 * KEY_BYTES
OPEN_TO_OTHERS = 0o077


class LocalProvider:
    """Wraps with AES-256-GCM under a key in secret memory."""

    def __init__(self, region: SecretRegion, slot: int) -> None:
        self._key = region.view(slot)

    @classmethod
    def of_file(cls, path: Path, region: SecretRegion) -> LocalProvider:
        """Return the provider of a key file, 32 bytes or 64 hex digits; raises `ConfigError`."""
        try:
            mode = path.stat().st_mode & 0o777
            if mode & OPEN_TO_OTHERS:
                raise ConfigError(f"shield_keys: {path} has mode {mode:04o}; run chmod 600 on it")
            return cls._of_bytes(path, str(path), region)
        except OSError as error:
            raise ConfigError(
                f"shield_keys: can't read {path}: {error.strerror};"
                f" `kvkeep keys init file:{path}` makes one"
            ) from None

    @classmethod
    def of_variable(cls, name: str, region: SecretRegion) -> LocalProvider:
        """Return the provider of an environment variable, 64 hex digits; raises `ConfigError`."""
        text = os.environ.get(name)
        if text is None:
            raise ConfigError(
                f"shield_keys: the environment has no {name}; set it to 64 hex digits"
            )
        return cls(region, _taken(text.encode(), f"the variable {name}", region))

    @classmethod
    def of_descriptor(cls, number: str, region: SecretRegion) -> LocalProvider:
        """Return the provider of an open file of this or another process; raises `ConfigError`.

        `5@123` is descriptor 5 of process 123. A pipe can be read once: a key process that is
        started again needs a file.
        """
        handle, _, process = number.partition("@")
        path = Path(f"/proc/{process or 'self'}/fd/{handle}")
        try:
            return cls._of_bytes(path, f"descriptor {handle}", region)
        except OSError as error:
            raise ConfigError(
                f"shield_keys: can't read descriptor {handle}: {error.strerror};"
                " open it for the server"
            ) from None

    @classmethod
    def given(cls, key: bytes, region: SecretRegion) -> LocalProvider:
        """Return the provider of 32 bytes that this process was told; raises `ConfigError`."""
        return cls(region, _taken(key, "what this worker was given", region))

    @classmethod
    def _of_bytes(cls, path: Path, what: str, region: SecretRegion) -> LocalProvider:
        buffer = bytearray(HEX_CHARS + 2)
        with path.open("rb", buffering=0) as file:
            count = file.readinto(buffer)
        try:
            return cls(region, _taken(memoryview(buffer)[:count], what, region))
        finally:
            buffer[:] = bytes(len(buffer))

    def wrap(self, key: memoryview, label: bytes) -> bytes:
        """Return the key wrapped."""
        return envelope.wrap(self._key, key, label)

    def unwrap(self, wrapped: bytes, label: bytes, into: memoryview) -> None:
        """Write the key that was wrapped into 32 bytes."""
        envelope.unwrap(self._key, wrapped, label, into)

    def rewrap(self, wrapped: bytes, label: bytes) -> bytes:
        """Return what was given: the key has one version."""
        return wrapped

    def destroy(self, label: bytes) -> bool:
        """Destroy nothing: one key wraps all."""
        return False


def make_key_file(path: Path) -> None:
    """Write a new key file, mode 0600; raises `ConfigError` where there is one already."""
    if path.exists():
        raise ConfigError(f"shield_keys: {path} is there already; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, os.urandom(KEY_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise ConfigError(f"shield_keys: can't write {path}: {error.strerror}") from None


def _taken(raw: bytes | memoryview, what: str, region: SecretRegion) -> int:
    """Return the slot that a key, as bytes or in hex, was put in."""
    slot = region.take()
    view = region.view(slot)
    if len(raw) == KEY_BYTES:
        view[:] = raw
        return slot
    try:
        view[:] = bytes.fromhex(bytes(raw).decode("ascii").strip())
    except ValueError:
        region.give(slot)
        raise ConfigError(
            f"shield_keys: {what} holds no key: it must be 32 bytes, or 64 hex digits"
        ) from None
    return slot
