from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import pytest

from kvkeep.errors import ConfigError
from kvkeep.shield.keystore import KeyFile, KeyStore, OwnerKeys, refuse_inside


def keys(key_id: str = "id") -> OwnerKeys:
    return OwnerKeys(key_id=key_id, root=b"root", name=b"name", created=1.0)


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    made = KeyStore(tmp_path / "below" / "sealing.json")
    made.create()
    return made


def test_a_store_is_for_its_user_alone_and_seen_by_others(store: KeyStore) -> None:
    assert store.path.stat().st_mode & 0o777 == 0o600
    other = KeyStore(store.path)
    assert other.read().owners == {}
    with store.editing() as put:
        put(store.read().with_owner("acme", keys()))
    assert other.read().owners == {"acme": keys()}
    assert other.read() is other.read(), "read anew where it changed alone"
    assert list(store.path.parent.glob("*.new")) == []


def test_edits_of_several_threads_are_not_lost(store: KeyStore) -> None:
    def add(number: int) -> None:
        own = KeyStore(store.path)
        with own.editing() as put:
            put(own.read().with_owner(f"t{number}", keys()))

    threads = [threading.Thread(target=add, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.read().owners) == 8


def test_gateways_and_their_own_tenants_belong_together() -> None:
    file = KeyFile(store_id="s", owners={"gw": keys(), "gw/a": keys(), "gwen": keys()})
    assert file.of_tenant("gw") == ("gw", "gw/a")
    assert file.of_tenant("gw/a") == ("gw/a",)


def test_what_was_destroyed_is_overwritten(store: KeyStore) -> None:
    with store.editing() as put:
        put(store.read().with_owner("acme", keys()))
        file = store.read()
        handle = os.open(store.path, os.O_RDONLY)
        store.scrub_after(lambda: put(msgspec.structs.replace(file, owners={})))
    try:
        assert set(os.read(handle, 1 << 20)) == {0}
    finally:
        os.close(handle)
    assert store.read().owners == {}


def test_a_file_that_is_replaced_and_scrubbed_while_it_is_read_is_read_again(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, read = KeyStore(store.path), Path.read_bytes

    def scrubbed(path: Path) -> bytes:
        monkeypatch.setattr(Path, "read_bytes", read)
        with store.editing() as put:
            put(store.read().with_owner("acme", keys()))
        return bytes(64)

    monkeypatch.setattr(Path, "read_bytes", scrubbed)
    assert fresh.read().owners == {"acme": keys()}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is no key store"),
        (b"{}", "is no key store"),
        (b'{"store_id": 3}', "is no key store"),
        (b'{"store_id": "s", "version": 9}', "format 9, this kvkeep reads 1"),
    ],
)
def test_what_is_no_store_is_one_sentence(store: KeyStore, raw: bytes, words: str) -> None:
    store.path.write_bytes(raw)
    with pytest.raises(ConfigError, match=words) as told:
        KeyStore(store.path).read()
    assert str(told.value).startswith("shield_store: ")


def test_a_store_that_others_may_read_or_own_is_refused(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640; run chmod 600"):
        store.read()
    store.path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ConfigError, match="belongs to another user"):
        store.read()


def test_a_store_that_is_not_there_or_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read .*: No such file"):
        KeyStore(tmp_path / "none").read()
    (tmp_path / "dir").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=r"can't read .*: Is a directory"):
        KeyStore(tmp_path / "dir").read()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="can't write beside"):
        KeyStore(tmp_path / "file" / "store").create()


def test_a_store_among_sealed_pages_is_refused(tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    (tmp_path / "link").symlink_to(tier)
    tier.mkdir()
    for path in (tier / "keys.json", tier / "deep" / "keys.json", tmp_path / "link" / "k"):
        with pytest.raises(ConfigError, match="lies in the tier's directory"):
            refuse_inside(path, [tmp_path / "other", tier])
    refuse_inside(tmp_path / "keys.json", [tier])
