from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.ledger import Ballot, Ledger, UnitRef
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.snapshot import Snapshot
from kvkeep.sharing.state import FileStore, NoStore, State, decode_state, encode_state
from tests.sharing.worlds import Setting


def test_a_file_is_replaced_as_a_whole_and_is_its_owners(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "deep" / "state")
    assert store.load() is None
    store.save(b"one")
    store.save(b"two")
    assert store.load() == b"two"
    path = tmp_path / "deep" / "state"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_save_that_fails_leaves_what_was(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "state")
    store.save(b"one")
    with pytest.raises(TypeError):
        store.save("no bytes")  # type: ignore[arg-type]
    assert store.load() == b"one"
    assert [found.name for found in tmp_path.iterdir()] == ["state"]


def test_no_store_keeps_nothing() -> None:
    store = NoStore()
    store.save(b"one")
    assert store.load() is None


def test_state_survives_its_bytes() -> None:
    ledger = Ledger()
    ref = UnitRef((b"p", b"q"), None, 0)
    below = UnitRef((b"r", b"s"), b"q", 1)
    ledger.cast([Ballot("a", "g", (ref,), below)], 3, 0, 10)
    state = State("v", 2, ledger, Snapshot(7))
    assert decode_state(encode_state(state), "v", 2) == state
    assert decode_state(None, "v", 2).ledger.units == {}


def test_what_nobody_else_sent_goes_with_its_only_voter() -> None:
    ledger = Ledger()
    ledger.cast([Ballot("a", "g", (UnitRef((b"p",), None, 0),))], 0, 0, 10)
    assert (ledger.forget("b"), ledger.forget("a"), ledger.units) == (0, 1, {})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="share_state"):
        FileStore(tmp_path).load()


def test_a_full_disk_stops_no_epoch(caplog: pytest.LogCaptureFixture) -> None:
    class Full(NoStore):
        def save(self, state: bytes) -> None:
            raise OSError(28, "No space left on device")

    setting = Setting()
    setting.store = Full()  # type: ignore[assignment]
    policy = setting.promotion(AtLeast(4))
    with caplog.at_level(logging.WARNING):
        assert policy.end_epoch(0.0).epoch == 1
    assert "OSError" in caplog.text
