"""What promotion remembers over restarts: chain hashes, names and epochs, never text."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from kvkeep.errors import ConfigError
from kvkeep.files import replace_file
from kvkeep.sharing.ledger import Ledger, Spending
from kvkeep.sharing.snapshot import Snapshot


class StateStore(Protocol):
    """Where a policy keeps its state over restarts."""

    def load(self) -> bytes | None:
        """Return what was saved last, None where nothing was."""

    def save(self, state: bytes) -> None:
        """Replace what is kept, all or nothing."""


class NoStore:
    """Keeps nothing: a restart begins with no votes."""

    def load(self) -> bytes | None:
        """Return None."""
        return None

    def save(self, state: bytes) -> None:
        """Drop it."""


class FileStore:
    """One file, mode 0600, replaced as a whole."""

    def __init__(self, path: Path, setting: str = "share_state") -> None:
        """`setting` names the file in errors."""
        self._path = path
        self._setting = setting

    def load(self) -> bytes | None:
        """Return the file's bytes; raises `ConfigError` where it is there and can't be read."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"{self._setting}: can't read {self._path}: {error.strerror}; name another file"
            ) from None

    def save(self, state: bytes) -> None:
        """Write a sibling, then rename it over the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, state)


class State(msgspec.Struct):
    """All that promotion carries from one run to the next."""

    version: str
    """The inspector's; under another one no vote stands."""
    unit_pages: int
    ledger: Ledger
    snapshot: Snapshot


def encode_state(state: State) -> bytes:
    """Return a state's bytes."""
    return msgspec.msgpack.encode(state)


def decode_state(raw: bytes | None, version: str | None, unit_pages: int) -> State:
    """Return what was saved; `version` None: under whatever rules.

    Nothing of it stands where it cannot be read or is of other units; `renewed` of it does where
    another inspector has made it.
    """
    empty = State(version or "", unit_pages, Ledger(), Snapshot())
    if raw is None:
        return empty
    try:
        state = msgspec.msgpack.decode(raw, type=State)
    except msgspec.MsgspecError:
        return empty
    if state.unit_pages != unit_pages:
        return empty
    return state if version in (None, state.version) else renewed(state, str(version))


def renewed(state: State, version: str) -> State:
    """Return what stands under another inspector: no vote, nothing public, all that was spent."""
    voters = {
        name: Spending(spent.period, spent.units) for name, spent in state.ledger.voters.items()
    }
    ledger = Ledger(voters=voters)
    return State(version, state.unit_pages, ledger, Snapshot(state.snapshot.epoch))
