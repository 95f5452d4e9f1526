"""Each worker of a cluster opens what it sealed itself, whatever files it has of the others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from kvkeep.cli import run
from kvkeep.errors import ConfigError, KeysGone, SealError
from kvkeep.sealing import SealContext, layers_of
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.keys import KeyClient
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.opened import opened, opened_by_worker
from kvkeep.shield.providers.local import make_key_file
from kvkeep.shield.providers.provider import parse_spec
from kvkeep.shield.receipt import SignedReceipt
from kvkeep.shield.workers import cluster_of, is_worker, owner_of, store_of, stores_of
from kvkeep.types import PageTag

PAGE, SIZES = b"a page of a tenant", (6, 12)


def context(owner: str) -> SealContext:
    return SealContext(owner, PageTag(owner), b"h" * 32, b"m" * 32, b"s" * 16)


class Keys:
    """A cluster's store, and whoever leads its workers."""

    def __init__(self, folder: Path) -> None:
        make_key_file(folder / "kek")
        self.provider, self.store = f"file:{folder / 'kek'}", folder / "keys" / "sealing.json"
        self.client = KeyClient(self.provider, str(self.store))
        self.client.start()

    @contextmanager
    def worker(self, name: str, key: bytes | None = None) -> Iterator[FrameSealer]:
        """Yield what seals on a worker, which has a key process of its own."""
        given = self.client.worker_key(name) if key is None else key
        own = KeyClient("", str(store_of(self.store, name)), given=given)
        own.start()
        try:
            yield FrameSealer(own)
        finally:
            own.close()


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    made = Keys(tmp_path)
    yield made
    made.client.close()


def opens(sealer: FrameSealer, frame: memoryview, owner: str = "acme") -> bytes:
    return b"".join(layers_of(sealer.open(context(owner), frame, SIZES), SIZES))


def test_a_worker_opens_its_own_pages_and_no_other_workers(keys: Keys) -> None:
    with keys.worker("prefill-0") as one, keys.worker("prefill-1") as other:
        frame = one.seal(context("acme"), PAGE, SIZES)
        assert opens(one, frame) == PAGE
        other.seal(context("acme"), PAGE, SIZES)  # it has keys of this owner too
        with pytest.raises(SealError, match="another key"):
            opens(other, frame)
        with pytest.raises(KeysGone):
            opens(other, frame, "nobody's")
        assert one.shelf_of("acme") != other.shelf_of("acme")
    with keys.worker("prefill-0") as again:
        assert opens(again, frame) == PAGE, "it comes back"


def test_a_worker_that_has_all_files_opens_none_of_the_others(keys: Keys) -> None:
    with keys.worker("prefill-0") as one:
        frame = one.seal(context("acme"), PAGE, SIZES)
    theirs = keys.client.worker_key("decode-0")
    for store in (store_of(keys.store, "prefill-0"), keys.store):
        with (
            pytest.raises(ConfigError, match=r"does not open .*sealing.json"),
            opened_by_worker(store, theirs),
        ):
            pass
    shutil.copy(store_of(keys.store, "prefill-0"), store_of(keys.store, "decode-0"))
    with (
        pytest.raises(ConfigError, match=r"does not open .*decode-0"),
        keys.worker("decode-0", theirs),
    ):
        pass
    ours = keys.client.worker_key("prefill-0")
    with keys.worker("decode-0", ours) as planted:
        assert opens(planted, frame) == PAGE, "with the key it would"


def test_workers_keys_have_nothing_in_common_and_stay(keys: Keys) -> None:
    names = ("prefill-0", "prefill-1", "decode-0")
    given = [keys.client.worker_key(name) for name in names]
    assert len(set(given)) == len(names)
    assert [keys.client.worker_key(name) for name in names] == given
    assert {len(key) for key in given} == {32}
    keys.client.rotate(owner_of("prefill-0"))
    with opened(keys.store, parse_spec(keys.provider)) as store:
        store.renew_root(owner_of("prefill-0"))
        make_key_file(keys.store.with_name("new"))
        store.move(parse_spec(f"file:{keys.store.with_name('new')}"))
    moved = KeyClient(f"file:{keys.store.with_name('new')}", str(keys.store))
    moved.start()
    try:
        assert [moved.worker_key(name) for name in names] == given
    finally:
        moved.close()


def test_whoever_leads_learns_no_name_key_of_a_worker(keys: Keys) -> None:
    keys.client.worker_key("prefill-0")
    again = KeyClient(keys.provider, str(keys.store))
    again.start()
    try:
        assert not again._names
        assert is_worker(next(iter(KeyStore(keys.store).read().owners)))
    finally:
        again.close()


def test_a_shredded_tenants_pages_open_on_no_worker(keys: Keys, tmp_path: Path) -> None:
    with keys.worker("prefill-0") as one, keys.worker("decode-0") as other:
        frames = [sealer.seal(context(o), PAGE, SIZES) for sealer in (one, other) for o in "ab"]
        keys.client.worker_key("decode-1")
        store_of(keys.store, "decode-1").unlink()  # one that is gone has no keys
        receipt = msgspec.json.decode(keys.client.shred("a"), type=SignedReceipt)
        said = receipt.check()
        assert [gone.owner for gone in said.destroyed] == ["a", "a"]
        assert not said.provider_destroyed
        for sealer, frame in ((one, frames[0]), (other, frames[2])):
            with pytest.raises(KeysGone):
                opens(sealer, frame, "a")
        assert (opens(one, frames[1], "b"), opens(other, frames[3], "b")) == (PAGE, PAGE)
        with pytest.raises(ConfigError, match="there are no keys of a tenant a "):
            keys.client.shred("a")


def test_names_of_workers_are_told_from_tenants(tmp_path: Path) -> None:
    assert [is_worker(name) for name in ("acme", "*public", owner_of("b-1"))] == [
        False,
        False,
        True,
    ]
    assert stores_of(tmp_path / "k.sealing") == []
    for name in ("b-1", "a-0", "a-0.lock"):
        path = tmp_path / "k.sealing.workers" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [store_of(tmp_path / "k.sealing", name) for name in ("a-0", "b-1")]
    assert stores_of(tmp_path / "k.sealing") == found
    assert cluster_of(store_of(Path("x/k.sealing"), "a-0")) == (Path("x/k.sealing"), "a-0")
    for name in ("", "../a", "a.b", "A", "a/b"):
        with pytest.raises(ConfigError, match=r"worker: .* must be of small letters"):
            owner_of(name)


def test_a_workers_store_is_administered_beside_the_clusters(
    keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    with keys.worker("prefill-0") as one:
        one.seal(context("acme"), PAGE, SIZES)
    own = store_of(keys.store, "prefill-0")
    flags = ["--shield-store", str(own), "--shield-keys", keys.provider]
    assert run(["keys", "rotate", "acme", *flags]) == 0
    assert "acme is in epoch 2" in capsys.readouterr().err
    assert run(["keys", "retire", "acme", "2", *flags]) == 0
    assert run(["keys", "rewrap", "--to", keys.provider, *flags]) != 0
    assert "rewrap the cluster's store" in capsys.readouterr().err
    keys.store.rename(keys.store.with_name("away.json"))
    assert run(["keys", "rotate", "acme", *flags]) != 0
    assert f"it needs {keys.store}" in capsys.readouterr().err
