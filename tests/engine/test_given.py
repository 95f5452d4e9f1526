"""What whoever leads a cluster gives a worker: its own key, and nothing that opens more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.engine.given import Giver
from kvkeep.engine.options import EngineOptions, GivenKeys, KeyOptions
from kvkeep.engine.sealers import (
    key_client,
    seal_model,
    sealing_of,
    shred_in,
    store_path,
    unwrap_of,
)
from kvkeep.errors import CheckpointError, ConfigError
from kvkeep.shield.folder import read_body
from kvkeep.shield.keyring import Keyring
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.opened import opened
from kvkeep.shield.providers.provider import parse_spec
from kvkeep.shield.receipt import SignedReceipt
from kvkeep.shield.workers import stores_of
from tests.shield.providers.machines import machine, verifier


def options(folder: Path, **changes: Any) -> EngineOptions:
    keys = KeyOptions(store=str(folder / "keys" / "sealing.json"), epoch_s=7.0)
    tiers = (f"disk:{folder / 'pages'},16MiB",)
    return msgspec.structs.replace(EngineOptions(model="m", keys=keys, tiers=tiers), **changes)


def test_a_worker_is_given_its_own_key_and_no_provider(tmp_path: Path) -> None:
    leads = options(tmp_path)
    giver = Giver(leads, tmp_path)
    try:
        one, other = giver.of("prefill-0"), giver.of("decode-0")
        assert one == giver.of("prefill-0")
        assert (one.provider, one.epoch_s) == (None, 7.0)
        assert one.store == f"{leads.keys.store}.workers/prefill-0"
        assert one.given is not None
        assert other.given is not None
        assert one.given.pages != other.given.pages
        sealing = sealing_of(msgspec.structs.replace(leads, keys=one))
        sealing.close()
        away = msgspec.structs.replace(one, store=str(tmp_path / "elsewhere" / "sealing.json"))
        with pytest.raises(ConfigError, match=r"all nodes .* must share the folder .*elsewhere"):
            key_client(away)
        stolen = msgspec.structs.replace(one, store=other.store)
        with pytest.raises(ConfigError, match=r"does not open .*decode-0"):
            sealing_of(msgspec.structs.replace(leads, keys=stolen))
    finally:
        giver.close()


@pytest.mark.parametrize("changes", [{"tiers": ()}, {"shield": "off"}])
def test_who_seals_nothing_below_memory_is_given_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    giver = Giver(options(tmp_path, **changes), tmp_path)
    assert giver.of("decode-0") == KeyOptions(epoch_s=7.0, given=GivenKeys())
    assert not list(tmp_path.iterdir())
    giver.close()


def test_an_attested_worker_is_released_a_key_of_its_own(tmp_path: Path) -> None:
    leads = options(tmp_path, shield="tee")
    named = "attested:https://v.example,kek,/entry"
    leads = msgspec.structs.replace(leads, keys=msgspec.structs.replace(leads.keys, provider=named))
    giver = Giver(leads, tmp_path)
    own = giver.of("decode-0")
    assert own.provider == "attested:https://v.example,kek/decode-0,/entry"
    assert own.store == f"{leads.keys.store}.workers/decode-0"
    assert (own.model_provider, own.given) == (named, None)
    giver.close()
    with pytest.raises(ConfigError, match="set shield_keys to attested:URL,KEY"):
        Giver(options(tmp_path, shield="tee"), tmp_path).of("decode-0")


def test_attested_workers_open_their_own_stores_alone_and_one_receipt_is_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvkeep.shield.keys.ANSWER_S", 60.0)  # of a process, on a loaded machine
    with (
        verifier() as service,
        machine(tmp_path / "one") as one,
        machine(tmp_path / "two") as two,
    ):
        one.measurement, two.measurement = b"one", b"two"
        service.only = {"kek/decode-0": b"one", "kek/decode-1": b"two"}
        for name in service.only:
            service.keys[name] = os.urandom(32)
        leads = options(tmp_path, shield="tee")
        provider = f"attested:{service.url},kek"
        keys = msgspec.structs.replace(leads.keys, provider=provider)
        giver = Giver(msgspec.structs.replace(leads, keys=keys), tmp_path)
        told = [giver.of(name) for name in ("decode-0", "decode-1")]
        for own, guest in zip(told, (one, two), strict=True):
            with opened(Path(own.store or ""), parse_spec(f"{own.provider},{guest.path}")) as store:
                Keyring(store.store, store.provider, store.region).name_key("acme")
        for asks, why in ((told[0], "refuses this machine's report"), (told[1], "not open")):
            spec = parse_spec(f"{asks.provider},{two.path}")
            with pytest.raises(ConfigError, match=why), opened(Path(told[0].store or ""), spec):
                pass
        assert stores_of(store_path(keys)) == [Path(own.store or "") for own in told]
        service.measurement = b"one"
        at_the_leaders = msgspec.structs.replace(keys, provider=f"{provider},{one.path}")
        receipt = msgspec.json.decode(shred_in(at_the_leaders, "acme"), type=SignedReceipt)
        assert [gone.owner for gone in receipt.check().destroyed] == ["acme", "acme"]
        for path in stores_of(store_path(keys)):
            assert "acme" not in KeyStore(path).read().owners


def test_a_sealed_checkpoint_is_opened_by_the_clusters_key_under_tee_too(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    with verifier() as service, machine(tmp_path / "entry") as guest:
        keys = KeyOptions(
            provider=f"attested:{service.url},kek,{guest.path}",
            store=str(tmp_path / "sealing.json"),
        )
        body = seal_model(keys, tiny["qwen2"], tmp_path / "sealed")
        leads = EngineOptions(model=str(tmp_path / "sealed"), shield="tee", keys=keys)
        own = Giver(leads, tmp_path / "sealed").of("decode-0")
        assert bytes(unwrap_of(own)(body)) == bytes(unwrap_of(keys)(body))


def test_a_sealed_checkpoints_key_is_given_in_place_of_its_provider(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    leads = options(tmp_path, tiers=())
    folder = tmp_path / "sealed"
    body = seal_model(leads.keys, tiny["qwen2"], folder)
    given = Giver(leads, folder).of("decode-0").given
    assert given is not None
    assert bytes(unwrap_of(KeyOptions(given=given))(body)) == given.model
    assert bytes(unwrap_of(leads.keys)(read_body(folder))) == given.model
    assert given.model.hex() not in repr(given)
    manifest = folder / "sealed.manifest"
    manifest.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="can't be read"):
        Giver(leads, folder)
