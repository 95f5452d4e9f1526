from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.providers.local import LocalProvider, make_key_file
from kvkeep.shield.receipt import OWN_COPIES, SignedReceipt, open_store, read_receipt, shred
from tests.shield.vaults import Vault, page_id, vault


@pytest.fixture
def v(tmp_path: Path) -> Iterator[Vault]:
    with vault(tmp_path) as made:
        open_store(made.store, made.provider, "file", made.region)
        yield made


def destroyed(v: Vault, tenant: str) -> SignedReceipt:
    raw = shred(tenant, v.store, v.provider, v.region, v.clock.wall)
    return msgspec.json.decode(raw, type=SignedReceipt)


def test_a_receipt_says_what_was_destroyed_and_what_not(v: Vault, tmp_path: Path) -> None:
    for owner in ("gw", "gw/a", "rival"):
        v.ring.fresh(owner, [page_id()])
    v.ring.rotate("gw/a")
    ids = {owner: keys.key_id for owner, keys in v.store.read().owners.items()}
    receipt = destroyed(v, "gw")
    own = v.store.read().own
    assert own is not None
    said = receipt.check(own.public)
    assert (said.tenant, said.provider, said.at) == ("gw", "file", v.clock.wall_s)
    assert [(d.owner, d.key_id, d.epochs) for d in said.destroyed] == [
        ("gw", ids["gw"], 1),
        ("gw/a", ids["gw/a"], 2),
    ]
    assert said.provider_destroyed
    assert OWN_COPIES not in said.not_covered
    assert any("public pages" in line for line in said.not_covered)
    assert list(v.store.read().owners) == ["rival"]
    text = v.store.path.read_text()
    assert "gw/a" in text, "its epoch numbers are not used again"
    path = tmp_path / "receipt.json"
    path.write_bytes(msgspec.json.encode(receipt))
    assert read_receipt(path) == receipt
    path.write_bytes(b"[]")
    with pytest.raises(ConfigError, match="can't be read"):
        read_receipt(path)


def test_a_changed_receipt_does_not_hold(v: Vault) -> None:
    v.ring.fresh("acme", [page_id()])
    receipt = destroyed(v, "acme")
    changed = receipt.statement.replace(b"acme", b"ecma")
    with pytest.raises(SealError, match="changed"):
        msgspec.structs.replace(receipt, statement=changed).check()
    with pytest.raises(SealError, match="another key store"):
        receipt.check(bytes(32))
    with pytest.raises(SealError):
        msgspec.structs.replace(receipt, public=bytes(32)).check()


def test_a_provider_that_is_down_keeps_no_key_alive(v: Vault) -> None:
    v.ring.fresh("acme", [page_id()])
    v.provider.down = True
    receipt = destroyed(v, "acme")
    assert v.store.read().owners == {}
    with pytest.raises(SealError, match="not signed"):
        receipt.check()
    said = msgspec.json.decode(receipt.statement)
    assert said["provider_destroyed"] is False
    assert OWN_COPIES in said["not_covered"]


def test_who_has_no_keys_is_named(v: Vault) -> None:
    with pytest.raises(ConfigError, match="no keys of a tenant nobody"):
        destroyed(v, "nobody")


def test_a_store_never_opened_signs_nothing(tmp_path: Path) -> None:
    with vault(tmp_path) as v:
        v.ring.fresh("acme", [page_id()])
        assert destroyed(v, "acme").signature is None


def test_the_shelf_key_stays_and_another_provider_is_refused(v: Vault, tmp_path: Path) -> None:
    store = KeyStore(v.store.path)
    first = open_store(store, v.provider, "file", v.region)
    assert first == open_store(store, v.provider, "file", v.region) != bytes(32)
    make_key_file(tmp_path / "other")
    other = LocalProvider.of_file(tmp_path / "other", v.region)
    with pytest.raises(ConfigError, match=r"does not open .*sealing.json, made with file"):
        open_store(store, other, "file", v.region)
    v.provider.down = True
    with pytest.raises(KeysUnavailable):
        open_store(store, v.provider, "file", v.region)
