"""What whoever leads a cluster gives a worker: its own key, and nothing that opens more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.engine.given import Giver
from kvkeep.engine.options import EngineOptions, GivenKeys, KeyOptions
from kvkeep.engine.sealers import key_client, seal_model, sealing_of, unwrap_of
from kvkeep.errors import CheckpointError, ConfigError
from kvkeep.shield.folder import read_body


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


def test_an_attested_worker_asks_for_itself(tmp_path: Path) -> None:
    leads = options(tmp_path, shield="tee")
    giver = Giver(leads, tmp_path)
    assert giver.of("decode-0") == leads.keys
    giver.close()


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
