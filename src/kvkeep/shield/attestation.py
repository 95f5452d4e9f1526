"""What a confidential machine says of itself, through the kernel's configfs.

An entry below `/sys/kernel/config/tsm/report` takes up to 64 bytes in `inblob` and gives a signed
report that holds them in `outblob`; `generation` counts the writes, so that a report that somebody
else asked for in between is not taken for one's own.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from kvkeep.errors import KeysUnavailable

REPORTS: Final = Path("/sys/kernel/config/tsm/report")
TRIES: Final = 3
_READ_BYTES: Final = 64 << 10
MOST_BYTES: Final = 1 << 20


class Report(NamedTuple):
    """A signed statement of the machine that holds what it was asked with."""

    provider: str
    """The kernel's name of who signs: sev_guest or tdx_guest."""
    report: bytes
    auxiliary: bytes
    """Certificates, where the provider gives any."""


def bound_data(nonce: bytes, public: bytes) -> bytes:
    """Return the 64 bytes that tie a report to a verifier's nonce and a key process's key."""
    return hashlib.sha512(nonce + hashlib.sha256(public).digest() + b"kvs1").digest()


class ReportEntry:
    """One entry: made for each report and removed, or made before by somebody who may."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def quote(self, data: bytes) -> Report:
        """Return a report over 64 bytes; raises `KeysUnavailable` where there is none."""
        try:
            with self._made():
                for _ in range(TRIES):
                    before = self._generation()
                    self._write("inblob", data)
                    found = Report(
                        self._read("provider").decode("ascii", "replace").strip(),
                        self._read("outblob"),
                        self._read("auxblob") if (self._path / "auxblob").exists() else b"",
                    )
                    if self._generation() == before + 1:
                        return found
        except OSError as error:
            why = "too long" if error.errno == errno.EFBIG else error.strerror
            raise KeysUnavailable(f"this machine gives no attestation report: {why}") from None
        raise KeysUnavailable("another process asks for reports by the same entry")

    @contextmanager
    def _made(self) -> Iterator[None]:
        made = not self._path.is_dir()
        if made:
            self._path.mkdir()
        try:
            yield
        finally:
            if made:
                self._path.rmdir()

    def _generation(self) -> int:
        text = self._read("generation").strip()
        return int(text) if text.isdigit() else -1

    def _write(self, name: str, data: bytes) -> None:
        handle = os.open(self._path / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(handle, data)
        finally:
            os.close(handle)  # the kernel takes what was written when it is closed

    def _read(self, name: str) -> bytes:
        parts: list[bytes] = []
        with (self._path / name).open("rb", buffering=0) as file:
            while part := file.read(_READ_BYTES):
                parts.append(part)
                if len(parts) * _READ_BYTES > MOST_BYTES:
                    raise OSError(errno.EFBIG, "too long")
        return b"".join(parts)


def entry_of(path: str | None) -> ReportEntry:
    """Return an entry that was made before, or one of this process's own."""
    return ReportEntry(Path(path) if path else REPORTS / f"kvkeep-{os.getpid()}")


def can_attest(path: str | None, reports: Path = REPORTS) -> bool:
    """Tell whether there is what gives reports: the entry named, or the kernel's folder."""
    return Path(path).is_dir() if path else reports.is_dir()
