"""The tenant file: its life, its mode, its checks."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from kvkeep.engine.api import TenantTerms
from kvkeep.errors import ConfigError
from kvkeep.server.keys import key_digest
from kvkeep.server.store import TenantStore
from kvkeep.server.tenants import SharingTerms, TenantFile


@pytest.fixture
def file(tmp_path: Path) -> TenantFile:
    return TenantFile(tmp_path / "tenants.json")


def test_a_file_is_made_private_and_holds_digests_only(file: TenantFile) -> None:
    key = file.add("acme", share=0.5)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    raw = file.path.read_text()
    assert key.text not in raw
    assert key.text.split("_")[2] not in raw
    assert key_digest(key.text) in raw
    assert [t.name for t in file.list()] == ["acme"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o777, 0o700])
def test_a_file_that_others_could_use_is_refused(file: TenantFile, mode: int) -> None:
    file.add("acme", share=0.5)
    file.path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        file.read()
    file.path.chmod(0o400)
    assert file.read().tenants


def test_a_missing_a_broken_and_a_contradictory_file_are_refused(file: TenantFile) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        file.read()
    assert file.list() == ()
    file.add("acme", share=0.5)
    good = file.path.read_text()
    for bad in ("{", "[]", good.replace('"share": 0.5', '"share": "half"')):
        file.path.write_text(bad)
        with pytest.raises(ConfigError, match="no valid tenant file"):
            file.read()
    for bad in (good.replace('"share": 0.5', '"share": 1.5'), good.replace("acme", "a/b")):
        file.path.write_text(bad)
        with pytest.raises(ConfigError):
            file.read()


def test_shares_add_up_to_one_at_most(file: TenantFile) -> None:
    for name in ("a", "b", "c"):
        file.add(name, share=1 / 3)
    with pytest.raises(ConfigError, match="share"):
        file.add("d", share=0.01)
    assert [t.name for t in file.list()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "share", "concurrency", "gateway", "children", "word"),
    [
        ("", 0.1, 1, False, {}, "name"),
        ("a/b", 0.1, 1, False, {}, "name"),
        ("a" * 64, 0.1, 1, False, {}, "name"),
        ("a", 0.0, 1, False, {}, "share"),
        ("a", -0.1, 1, False, {}, "share"),
        ("a", float("nan"), 1, False, {}, "share"),
        ("a", 0.1, 0, False, {}, "concurrency"),
        ("a", 0.1, 1, False, {"x": 0.5}, "children"),
        ("a", 0.1, 1, True, {"x": 0.6, "y": 0.5}, "children"),
        ("a", 0.1, 1, True, {"x": 0.0}, "children"),
        ("a", 0.1, 1, True, {"x/y": 0.1}, "name"),
    ],
)
def test_a_wrong_tenant_is_named(
    file: TenantFile,
    name: str,
    share: float,
    concurrency: int,
    gateway: bool,
    children: dict[str, float],
    word: str,
) -> None:
    with pytest.raises(ConfigError, match=word):
        file.add(name, share=share, concurrency=concurrency, gateway=gateway, children=children)
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("sharing", "word"),
    [
        (SharingTerms(group=""), "group"),
        (SharingTerms(group="a/b"), "group"),
        (SharingTerms(ttl_s=0.0), "ttl_s"),
        (SharingTerms(ttl_s=float("inf")), "ttl_s"),
        (SharingTerms(ttl_s=float("nan")), "ttl_s"),
    ],
)
def test_wrong_terms_are_named(file: TenantFile, sharing: SharingTerms, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        file.add("a", share=0.1, sharing=sharing)


def test_terms_are_a_gateways_for_all_its_children(file: TenantFile) -> None:
    file.add("gw", share=0.4, gateway=True, children={"x": 0.5}, sharing=SharingTerms("g"))
    terms = {name: tenant.terms() for name, tenant in file.read().accounts().items()}
    assert terms["gw"] == terms["gw/x"] == TenantTerms(voter="gw", group="g")


def test_a_group_is_its_tenants_whatever_their_children(file: TenantFile) -> None:
    file.add("alone", share=0.1)
    assert TenantStore.open(file.path).largest_group() == 0
    for name, group in (("a", "g"), ("b", "h"), ("c", "h")):
        file.add(name, share=0.1, sharing=SharingTerms(group=group))
    children = {"x": 0.5, "y": 0.5}
    terms = SharingTerms(group="g")
    file.add("gate", share=0.1, gateway=True, children=children, sharing=terms)
    store = TenantStore.open(file.path)
    assert (store.largest_group(), store.shares()) == (2, True)


def test_quotas_give_children_their_slice_of_the_gateways_share(file: TenantFile) -> None:
    file.add("a", share=0.5)
    file.add("gw", share=0.4, gateway=True, children={"x": 0.5, "y": 0.25})
    assert file.read().quotas() == pytest.approx({"a": 0.5, "gw": 0.1, "gw/x": 0.2, "gw/y": 0.1})


def test_rotation_keeps_two_keys_alive_at_most(tmp_path: Path) -> None:
    now = 1000.0
    file = TenantFile(tmp_path / "t.json", now=lambda: now)
    first = file.add("a", share=0.5)
    now += 1
    second = file.rotate("a", overlap_s=100)
    keys = {k.id: k for k in file.list()[0].keys}
    assert keys.keys() == {first.id, second.id}
    assert (keys[first.id].expires, keys[second.id].expires) == (1101.0, None)
    assert keys[first.id].live(1100)
    assert not keys[first.id].live(1101)
    now += 1
    third = file.rotate("a", overlap_s=100)
    assert [k.id for k in file.list()[0].keys] == [second.id, third.id]
    fourth = file.rotate("a", overlap_s=0)
    assert [k.id for k in file.list()[0].keys] == [fourth.id]


def test_a_rotation_never_lengthens_a_keys_life(tmp_path: Path) -> None:
    file = TenantFile(tmp_path / "t.json", now=lambda: 1000.0)
    first = file.add("a", share=0.5, expires_s=10)
    file.rotate("a", overlap_s=100)
    assert next(k for k in file.list()[0].keys if k.id == first.id).expires == 1010.0


def test_revocation_of_a_key_and_of_a_tenant(file: TenantFile) -> None:
    first = file.add("a", share=0.5)
    file.add("b", share=0.5)
    second = file.rotate("a")
    file.revoke("a", first.id)
    assert [k.id for k in file.list()[0].keys] == [second.id]
    with pytest.raises(ConfigError, match="key"):
        file.revoke("a", first.id)
    file.revoke("a")
    assert [t.name for t in file.list()] == ["b"]
    with pytest.raises(ConfigError, match="name"):
        file.revoke("a")
    with pytest.raises(ConfigError, match="name"):
        file.rotate("a")
    with pytest.raises(ConfigError, match="name"):
        file.add("b", share=0.1)


def test_a_write_that_fails_leaves_the_old_file(
    file: TenantFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add("a", share=0.5)
    before = file.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.add("b", share=0.5)
    assert file.path.read_bytes() == before
    assert sorted(p.name for p in file.path.parent.iterdir()) == [
        "tenants.json",
        "tenants.json.lock",
    ]


def test_writers_at_the_same_time_lose_nothing(file: TenantFile) -> None:
    def add(i: int) -> None:
        TenantFile(file.path).add(f"t{i}", share=0.05)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert {t.name for t in file.list()} == {f"t{i}" for i in range(8)}


def test_an_unknown_scope_key_is_refused(file: TenantFile) -> None:
    file.add("a", share=0.5)
    table = msgspec.json.decode(file.path.read_bytes())
    table["scope_key"] = "zz"
    file.path.write_bytes(msgspec.json.encode(table))
    with pytest.raises(ConfigError, match="scope_key"):
        file.read()
