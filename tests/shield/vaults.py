"""Key stores, providers and clocks for tests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvkeep.errors import KeysUnavailable
from kvkeep.shield import envelope
from kvkeep.shield.issue import Issuer
from kvkeep.shield.keyring import Keyring
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.providers.local import LocalProvider, make_key_file
from kvkeep.shield.secret import SecretRegion


class Clock:
    """Time that a test moves, as wall and as monotonic clock."""

    def __init__(self) -> None:
        self.wall_s = 1_800_000_000.0
        self.steady_s = 100.0

    def wall(self) -> float:
        return self.wall_s

    def steady(self) -> float:
        return self.steady_s

    def pass_(self, seconds: float) -> None:
        self.wall_s += seconds
        self.steady_s += seconds


class Flaky:
    """A provider that can be down; counts what it is asked."""

    def __init__(self, inner: LocalProvider) -> None:
        self._inner = inner
        self.down = False
        self.unwraps = 0
        self.destroyed: list[bytes] = []

    def wrap(self, key: memoryview, label: bytes) -> bytes:
        self._check()
        return self._inner.wrap(key, label)

    def unwrap(self, wrapped: bytes, label: bytes, into: memoryview) -> None:
        self.unwraps += 1
        self._check()
        self._inner.unwrap(wrapped, label, into)

    def rewrap(self, wrapped: bytes, label: bytes) -> bytes:
        self._check()
        return self._inner.rewrap(wrapped, label)

    def destroy(self, label: bytes) -> bool:
        self._check()
        self.destroyed.append(label)
        return True

    def _check(self) -> None:
        if self.down:
            raise KeysUnavailable("the provider is down")


class Vault:
    """A key store in a folder, its provider and a ring over both."""

    def __init__(self, folder: Path, region: SecretRegion) -> None:
        self.clock = Clock()
        self.region = region
        self.kek_path = folder / "kek"
        if not self.kek_path.exists():
            make_key_file(self.kek_path)
        self.provider = Flaky(LocalProvider.of_file(self.kek_path, region))
        self.store = KeyStore(folder / "sealing.json")
        self.store.create()
        self.ring = self.new_ring()

    def new_ring(self) -> Keyring:
        """A ring as another key process over the same store has it."""
        return Keyring(
            KeyStore(self.store.path),
            self.provider,
            self.region,
            wall=self.clock.wall,
            clock=self.clock.steady,
        )

    def secrets(self) -> dict[str, bytes]:
        """Every key above a page's, unwrapped with the key file alone."""
        return secrets_of(self.kek_path.read_bytes(), self.store)


def issuer(v: Vault) -> Issuer:
    """Edits of a vault's store, as a process of its own does them."""
    return Issuer(KeyStore(v.store.path), v.provider, v.region, v.clock.wall)


def secrets_of(kek: bytes, store: KeyStore) -> dict[str, bytes]:
    """Every key above a page's in a store, unwrapped with the provider's alone."""
    found = {"kek": kek}
    for owner, keys in store.read().owners.items():
        root = _open(kek, keys.root, envelope.root_label(owner, keys.key_id))
        found[f"{owner} root"] = root
        for epoch in keys.epochs:
            label = envelope.epoch_label(owner, keys.key_id, epoch.number)
            found[f"{owner} epoch {epoch.number}"] = _open(root, epoch.wrapped, label)
    return found


@contextmanager
def vault(folder: Path) -> Iterator[Vault]:
    """A vault whose memory is given back."""
    region = SecretRegion(256)
    try:
        yield Vault(folder, region)
    finally:
        region.close()


def found_in(pid: int, needles: dict[str, bytes]) -> set[str]:
    """Which of these bytes are anywhere in a process's memory that can be read at all."""
    found = set()
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            begin, end = (int(x, 16) for x in re.split("[- ]", line, maxsplit=2)[:2])
            if " rw" not in line or "[vvar" in line:
                continue
            try:
                memory.seek(begin)
                content = memory.read(end - begin)
            except OSError:
                continue
            found |= {name for name, raw in needles.items() if raw in content}
    return found


def page_id() -> bytes:
    """A page's random name."""
    return os.urandom(16)


def _open(key: bytes, wrapped: bytes, label: bytes) -> bytes:
    plain = bytearray(32)
    envelope.unwrap(key, wrapped, label, memoryview(plain))
    return bytes(plain)
