from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.cache.tier.files import Directory
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cli import run
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.keys import KeyClient
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.opened import opened
from kvkeep.shield.providers.provider import parse_spec
from tests.cache.tier.rigs import Rig, page
from tests.shield.vaults import page_id, vault


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A store with two owners; what follows a command to name it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvkeep.cli.engine.forbid_dumps", lambda: None)
    with vault(tmp_path) as v:
        with opened(v.store.path, parse_spec(f"file:{v.kek_path}")):
            pass
        for owner in ("acme", "rival"):
            v.ring.fresh(owner, [page_id()])
        return ["--shield-store", str(v.store.path), "--shield-keys", f"file:{v.kek_path}"]


def test_a_shredded_tenant_has_a_receipt_that_verifies(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = tmp_path / "receipt.json"
    assert run(["tenant", "shred", "acme", "--receipt", str(receipt), *store]) == 0
    assert "kvkeep tenant purge acme" in capsys.readouterr().err
    assert run(["keys", "verify", str(receipt), *store[:2]]) == 0
    shown = capsys.readouterr().out
    assert "acme: 1 sets of keys destroyed" in shown
    assert "not covered: copies of the key store" in shown
    own = KeyStore(Path(store[1])).read().own
    assert own is not None
    assert run(["keys", "verify", str(receipt), "--public", own.public.hex()]) == 0
    assert run(["keys", "verify", str(receipt), "--public", "00" * 32]) == 1
    assert run(["keys", "verify", str(receipt), "--public", "zz"]) == 1
    assert "public: must be 64 hex digits" in capsys.readouterr().err
    assert run(["keys", "status", *store[:2]]) == 0
    shown = capsys.readouterr().out
    assert "rival" in shown
    assert "destroyed 20" in shown
    assert own.public.hex() in shown
    assert run(["tenant", "shred", "acme", *store]) == 1
    assert "no keys of a tenant acme" in capsys.readouterr().err


def test_a_receipt_goes_to_stdout_unless_told_otherwise(
    store: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["tenant", "shred", "rival", *store]) == 0
    (tmp_path / "r").write_text(capsys.readouterr().out)
    assert run(["keys", "verify", "r", *store[:2]]) == 0


def test_keys_are_rotated_and_wrapped_anew(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["keys", "rotate", "acme", *store]) == 0
    assert "acme is in epoch 2" in capsys.readouterr().err
    assert run(["keys", "rotate", "acme", "--root", *store]) == 0
    assert run(["keys", "rewrap", *store]) == 0
    assert "Wrapped 2 roots." in capsys.readouterr().err
    new = f"file:{tmp_path / 'new'}"
    assert run(["keys", "init", new]) == 0
    assert run(["keys", "rewrap", "--to", new, *store]) == 0
    assert run(["keys", "rotate", "acme", *store]) == 1
    assert "does not open" in capsys.readouterr().err
    assert run(["keys", "rotate", "acme", *store[:3], new]) == 0
    assert "acme is in epoch 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["keys", "init", "env:NAME"], "is made where it lives"),
        (["keys", "init", "file:"], "shield_keys: file is written file:PATH"),
        (["keys", "rotate", "acme", "--shield-store", "none"], "there is no none"),
        (["keys", "rewrap", "--to", "paper:1"], "'paper' is no provider"),
        (["keys", "status", "--shield-store", "none"], "can't read none"),
        (["keys", "verify", "none"], "receipt: none can't be read"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    command: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command) == 1
    assert words in capsys.readouterr().err


def test_a_store_never_opened_signs_nothing_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = KeyStore(tmp_path / "s")
    store.create()
    assert run(["keys", "status", "--shield-store", str(store.path)]) == 0
    assert "provider: none yet; receipts are signed by none yet" in capsys.readouterr().out


def test_pages_that_are_left_by_epoch_are_told_and_old_keys_go(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = KeyClient(store[3], store[1])
    client.start()
    try:
        rig = Rig(
            TierSizes(disk_bytes=1 << 24),
            disk=Directory(tmp_path / "tier"),  # type: ignore[arg-type]
            shares={"acme": 0.5},
            real=FrameSealer(client),
        )
        rig.tier.can_name(page(0, "acme"))
        rig.until(lambda: rig.tier.can_name(page(0, "acme")))
        rig.tier.set_shares(rig.shares, {})
        rig.store(*(page(number, "acme") for number in range(4)))
        rig.settle()
        client.rotate("acme")
        rig.tier.forget("acme")
        rig.store(*(page(number, "acme") for number in range(3, 5)))
        rig.settle()
        rig.tier.close(5.0)
    finally:
        client.close()
    named = ["--tier", f"disk:{tmp_path / 'tier'},64MiB"]
    assert run(["keys", "rotate", "acme", *store, *named]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "acme is in epoch 4" in said, "the store's first was made when clocks were ahead"
    assert "epoch 3: 2 pages in" in said
    assert "epoch 2" not in said, "pages that have gone do not count"
    assert run(["keys", "rotate", "rival", *store, *named]) == 0
    assert "pages in" not in capsys.readouterr().err
    assert run(["keys", "retire", "acme", "4", *store]) == 0
    assert "Destroyed 3 keys of acme" in capsys.readouterr().err
    assert run(["keys", "retire", "nobody", "3", *store]) == 1
    assert "the owner has no keys" in capsys.readouterr().err
