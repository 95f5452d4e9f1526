from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.addresses import is_loopback
from kvkeep.config import Settings, load
from kvkeep.errors import ConfigError


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_defaults_serve_the_demo_model_to_this_machine_only() -> None:
    settings = load()
    assert Path(settings.model).name == "demo"
    assert is_loopback(settings.host)
    assert settings.share == "selective"


def test_flags_win_over_environment_wins_over_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvkeep.toml").write_text("port = 1\nmax_num_seqs = 2\nseed = 3\n")
    monkeypatch.setenv("KVKEEP_MAX_NUM_SEQS", "20")
    monkeypatch.setenv("KVKEEP_SEED", "30")
    settings = load({"seed": 300})
    assert (settings.port, settings.max_num_seqs, settings.seed) == (1, 20, 300)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512MiB", 512 << 20), ("1GB", 10**9), ("4096", 4096)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert load({"kv_cache_memory_bytes": text}).kv_cache_memory_bytes == size


def test_a_named_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.toml").write_text("port = 7\n")
    (tmp_path / "kvkeep.toml").write_text("port = 8\n")
    assert load({"config": "other.toml"}).port == 7
    monkeypatch.setenv("KVKEEP_CONFIG", "other.toml")
    assert load().port == 7


@pytest.mark.parametrize("typo", ["max_num_seq", "max-num-seqs", "max_num_sequences"])
def test_an_unknown_key_in_the_file_names_the_nearest(tmp_path: Path, typo: str) -> None:
    (tmp_path / "kvkeep.toml").write_text(f"{typo} = 1\n")
    with pytest.raises(ConfigError, match=rf"kvkeep.toml .*'{typo}'.*'max_num_seqs'"):
        load()


def test_an_unknown_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVKEEP_MODLE", "x")
    with pytest.raises(ConfigError, match=r"environment .*'KVKEEP_MODLE'.*'KVKEEP_MODEL'"):
        load()


def test_an_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"command line .*'portt'.*'port'"):
        load({"portt": 1})


def test_a_missing_named_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"config: can't read gone.toml"):
        load({"config": "gone.toml"})


@pytest.mark.parametrize("content", [b"port = ", b"\xff\xfe"])
def test_a_broken_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kvkeep.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"kvkeep.toml is no TOML"):
        load()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "many"),
        ("port", 70_000),
        ("dtype", "float8"),
        ("max_num_seqs", 0),
        ("max_model_len", 1),
        ("drain_s", "nan"),
        ("drain_s", -1),
        ("seed", -1),
        ("kv_cache_memory_bytes", "4 parsecs"),
        ("admin_host", "0.0.0.0"),
        ("share", "all"),
        ("share", "some"),
        ("share", 3),
        ("share", "pinned"),
        ("share_k", 1),
        ("share_eps", 0),
        ("share_delta", 1),
        ("share_pool", 1),
        ("share_life_epochs", 1),
        ("share_webhook", "ftp://x"),
    ],
)
def test_a_bad_value_is_named_by_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        load({field: value})


@pytest.mark.parametrize("policy", ["all", "share_all", "safekv"])
def test_what_leaks_needs_its_confirmation(policy: str) -> None:
    with pytest.raises(ConfigError, match="unsafe-share-all"):
        load({"share": policy})
    assert load({"share": policy, "unsafe_share_all": True}).share in ("share_all", "safekv")


def test_a_policys_former_name_is_taken_for_todays() -> None:
    assert load({"share": "nothing"}).share == "isolate"


def test_no_auth_stays_on_loopback() -> None:
    assert load({"no_auth": True, "host": "::1"}).no_auth
    with pytest.raises(ConfigError, match=r"^no_auth: "):
        load({"no_auth": True, "host": "0.0.0.0"})


def test_settings_are_read_only() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_tiers_are_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("memory:1GiB", "disk:/a,2GiB")
    assert load().tier == ()
    assert load({"tier": list(both)}).tier == both
    (tmp_path / "kvkeep.toml").write_text('tier = ["memory:1GiB", "disk:/a,2GiB"]\n')
    assert load().tier == both
    monkeypatch.setenv("KVKEEP_TIER", "disk:/b,1GiB  memory:2GiB")
    assert load().tier == ("disk:/b,1GiB", "memory:2GiB")
