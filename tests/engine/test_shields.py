from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.engine.options import EngineOptions, KeyOptions, ShieldName
from kvkeep.engine.shields import shield_of
from kvkeep.errors import ConfigError
from kvkeep.shield.policy import NoShield, Shield


@pytest.mark.parametrize("mode", [None, "off", "seal", "tile"])
def test_without_a_mode_nothing_is_transformed(mode: ShieldName | None) -> None:
    assert EngineOptions(model="m").shield is None
    assert isinstance(shield_of(EngineOptions(model="m", shield=mode)), NoShield)


@pytest.mark.parametrize("mode", ["perm", "orth", "mask"])
def test_without_a_file_each_start_has_a_key_of_its_own(mode: ShieldName) -> None:
    options = EngineOptions(model="m", shield=mode)
    names = {shield_of(options).name for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith(f"{mode}-0-") for name in names)


def test_a_file_gives_the_same_key_until_the_epoch_changes(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(bytes(range(32)))
    file.chmod(0o600)
    first, again = (
        shield_of(EngineOptions(model="m", shield="orth", transform_key=str(file)))
        for _ in range(2)
    )
    later = shield_of(
        EngineOptions(model="m", shield="orth", transform_key=str(file), transform_epoch=1)
    )
    assert first.name == again.name != later.name


@pytest.mark.parametrize(
    ("mode", "content", "sentence"),
    [(0o644, bytes(32), "chmod 600"), (0o600, bytes(31), "32 are needed"), (0, None, "can't read")],
)
def test_a_bad_key_file_is_refused(
    mode: int, content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(ConfigError, match=sentence):
        shield_of(EngineOptions(model="m", shield="perm", transform_key=str(file)))


def test_a_key_without_a_transform_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is transformed"):
        shield_of(EngineOptions(model="m", transform_key="key"))


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="use off, seal, tile, perm, orth, mask or tee"):
        shield_of(EngineOptions(model="m", shield="rot13"))  # type: ignore[arg-type]


def test_tee_needs_a_verifier_and_a_machine_that_attests(tmp_path: Path) -> None:
    def tee(provider: str | None) -> Shield:
        options = EngineOptions(model="m", shield="tee", keys=KeyOptions(provider=provider))
        return shield_of(options)

    for other in (None, f"file:{tmp_path / 'kek'}"):
        with pytest.raises(ConfigError, match="tee needs keys that an attested machine alone"):
            tee(other)
    with pytest.raises(ConfigError, match="this machine gives no attestation reports"):
        tee(f"attested:https://example.org,kek,{tmp_path / 'nowhere'}")
    assert isinstance(tee(f"attested:https://example.org,kek,{tmp_path}"), NoShield)
