from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from kvkeep.errors import KeysUnavailable
from kvkeep.shield import attestation
from kvkeep.shield.attestation import ReportEntry, bound_data, can_attest, entry_of
from tests.shield.providers.machines import machine, signed


def test_a_report_holds_nonce_and_key() -> None:
    nonce, public = b"n" * 32, b"p" * 32
    inner = nonce + hashlib.sha256(public).digest() + b"kvs1"
    assert bound_data(nonce, public) == hashlib.sha512(inner).digest()
    assert len(bound_data(nonce, public)) == 64


def test_a_report_is_read_whole(tmp_path: Path) -> None:
    with machine(tmp_path / "entry") as one:
        found = ReportEntry(one.path).quote(b"d" * 64)
        assert found == ("sev_guest", signed(b"d" * 64, b"good"), b"certificates")
        (one.path / "auxblob").unlink()
        assert ReportEntry(one.path).quote(b"d" * 64).auxiliary == b""
        assert one.path.is_dir(), "an entry that was made before stays"


def test_a_report_that_another_process_may_have_asked_for_is_asked_for_again(
    tmp_path: Path,
) -> None:
    with machine(tmp_path / "entry") as one:
        one.strangers = 2
        assert ReportEntry(one.path).quote(b"d" * 64).report == signed(b"d" * 64, b"good")
        assert one.quotes == 3
        one.strangers = 3
        with pytest.raises(KeysUnavailable, match="another process asks"):
            ReportEntry(one.path).quote(b"d" * 64)


def test_a_machine_without_reports_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeysUnavailable, match="gives no attestation report: No such file"):
        ReportEntry(tmp_path / "nowhere" / "entry").quote(b"d" * 64)
    made = tmp_path / "made"
    with pytest.raises(KeysUnavailable, match="gives no attestation report"):
        ReportEntry(made).quote(b"d" * 64)
    assert not made.exists(), "an entry of its own is removed"
    assert not can_attest(None, tmp_path / "nowhere")
    assert can_attest(None, tmp_path)
    assert can_attest(str(tmp_path))
    assert not can_attest(str(made))


def test_a_generation_that_is_no_number_is_no_report(tmp_path: Path) -> None:
    with machine(tmp_path / "entry") as one:
        one._tell = lambda: None  # type: ignore[method-assign]
        (one.path / "generation").write_text("many")
        with pytest.raises(KeysUnavailable, match="another process asks"):
            ReportEntry(one.path).quote(b"d" * 64)


def test_a_report_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attestation, "_READ_BYTES", 8)
    monkeypatch.setattr(attestation, "MOST_BYTES", 24)
    with machine(tmp_path / "entry") as one:
        one.replayed = bytes(40)
        with pytest.raises(KeysUnavailable, match="report: too long"):
            ReportEntry(one.path).quote(b"d" * 64)


def test_an_entry_of_ones_own_is_named_by_the_process() -> None:
    assert entry_of(None)._path.name == f"kvkeep-{os.getpid()}"
    assert entry_of("/x/y")._path == Path("/x/y")


@pytest.mark.skipif(not can_attest(None), reason="this machine gives no attestation reports")
def test_this_machines_reports_hold_what_was_asked() -> None:
    data = os.urandom(64)
    assert data in entry_of(None).quote(data).report
