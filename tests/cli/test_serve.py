from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from kvkeep.cli import run
from kvkeep.cli.engine import describe, engine_options
from kvkeep.cli.serve import admin_token, announce, audit_consent, server_options
from kvkeep.config import load
from kvkeep.engine.api import ModelInfo
from kvkeep.errors import ConfigError
from kvkeep.models.make import tiny
from kvkeep.server.options import Bind
from kvkeep.server.serve import Listening

FREE_PORTS = ["--port", "0", "--admin-port", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny("llama", tmp_path_factory.mktemp("model") / "tiny"))


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert last.startswith("kvkeep: ")
    return last


def test_settings_reach_the_engine_and_the_server() -> None:
    settings = load(
        {"kv_cache_memory_bytes": "2GiB", "kernel": "avx2", "max_n": 3, "served_model_name": "m"}
    )
    engine, server = engine_options(settings), server_options(settings)
    assert (engine.kv_cache_bytes, engine.kernel, engine.served_name) == (2 << 30, "avx2", "m")
    assert (server.limits.max_n, server.served_names) == (3, ("m",))


def test_tiers_are_given_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    settings = load({"tier": ["memory:1GiB", "disk:/a,2GiB"]})
    assert engine_options(settings).tiers == ("memory:1GiB", "disk:/a,2GiB")
    arguments = ["serve", "--no-auth", "--tier", "memory:1GiB", "--tier", "swift:x"]
    assert run([*arguments, *FREE_PORTS]) == 1
    assert "tier: 'swift:x' is of no known kind" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        ("isolate", "no tenant's pages"),
        ("selective", "once 5 tenants"),
        ("dp", "at most e^2, plus 1e-06"),
        ("pinned", "operator"),
        ("salt", "salt (UNSAFE)"),
        ("safekv", "safekv (UNSAFE)"),
        ("share_all", "share_all (UNSAFE)"),
    ],
)
def test_the_policy_and_what_it_guarantees_are_told(
    policy: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"share": policy, "share_k": 5, "share_eps": 2.0, "unsafe_share_all": True}
    settings = load({**flags, "share_pinned": "pins.toml" if policy == "pinned" else None})
    bind = Bind(port=1)
    announce(Listening(bind, bind), settings, "token")
    told = " ".join(capsys.readouterr().err.split())
    assert word in told
    assert ("no tenant has a group" in told) is (policy in ("selective", "dp"))
    options, server = engine_options(settings).share, server_options(settings)
    assert (options.policy, options.k, options.state) == (policy, 5, "kvkeep-keys.json.votes")
    assert server.share_by_salt is (policy == "salt")
    assert server.share_always is (policy in ("pinned", "salt", "safekv", "share_all"))


@pytest.mark.parametrize(
    ("share", "largest", "told"),
    [
        ("selective", 0, "no tenant has a group"),
        ("selective", 4, "no group has 5 tenants"),
        ("selective", 5, None),
        ("dp", 1, None),
    ],
)
def test_a_server_whose_tenants_cannot_share_says_so(
    share: str, largest: int, told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    bind = Bind(port=1)
    announce(Listening(bind, bind), load({"share": share}), "token", largest_group=largest)
    said = " ".join(capsys.readouterr().err.split())
    assert ("--group GROUP" in said) is (told is not None)
    assert told is None or told in said


def test_without_keys_the_remedy_is_keys(capsys: pytest.CaptureFixture[str]) -> None:
    bind = Bind(port=1)
    announce(Listening(bind, bind), load({"no_auth": True}), "token")
    assert "is shared: serve with --keys" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kv", ["bf16", "k8v8", "k4v4", "k4v2", "k2v2", "auto"])
def test_the_form_of_pages_is_a_setting(kv: str) -> None:
    assert engine_options(load({"kv": kv})).kv == kv


def test_no_votes_are_kept_without_tenants() -> None:
    assert engine_options(load({"no_auth": True})).share.state is None
    assert server_options(load({"share_pinned": "pins.toml"})).share_always


def test_what_is_served_is_described() -> None:
    info = ModelInfo(
        name="toy",
        path="/models/toy",
        digest="00",
        max_model_len=4096,
        vocab_size=2048,
        dtype="bfloat16",
        num_layers=4,
        num_kv_heads=2,
        head_dim=64,
        num_pages=100,
        bytes_per_token=2048,
        kernel="avx2",
        kv_bytes=100 * 64 * 2048,
        eos_token_ids=(0,),
    )
    shown = describe(info)
    for word in ("toy", "bfloat16", "100 of 64 tokens, 12.5 MiB", "2048", "avx2", "as computed"):
        assert word in shown
    coded = msgspec.structs.replace(info, kv="k2v2", window_tokens=256, staged_bytes=3 << 20)
    assert "k2v2, the last 256 tokens or fewer as computed (3.0 MiB)" in describe(coded)


def test_the_admin_token_comes_from_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a token of some length\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        admin_token(file)
    file.chmod(0o600)
    assert admin_token(file) == "a token of some length"
    file.write_text("short")
    with pytest.raises(ConfigError, match="at least"):
        admin_token(file)
    with pytest.raises(ConfigError, match="can't read"):
        admin_token(tmp_path / "gone")
    assert admin_token(None) != admin_token(None)


def test_the_consent_to_audits_is_one_line_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "consent"
    file.write_text("a-token-of-this-operator\n")
    options = server_options(load({"audit_consent_file": file}))
    assert options.audit_consent == "a-token-of-this-operator"
    assert server_options(load()).audit_consent is None
    for text in ("short", "two lines of\nsome length each"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"audit_consent_file: .*one line"):
            audit_consent(file)
    with pytest.raises(ConfigError, match=r"audit_consent_file: can't read .*gone"):
        audit_consent(tmp_path / "gone")


def test_no_keys_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--keys", str(tmp_path / "keys.json")]) == 1
    assert "kvkeep tenant add" in one_sentence(capsys)


def test_a_wrong_directory_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--no-auth", "--model", str(tmp_path), *FREE_PORTS]) == 1
    assert str(tmp_path) in one_sentence(capsys)


def test_too_little_memory_is_one_sentence(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", "--no-auth", "--model", model, "--kv-cache-memory-bytes", "900TiB"]
    assert run([*arguments, *FREE_PORTS]) == 1
    assert "kv_cache_memory_bytes: " in one_sentence(capsys)


def test_a_port_in_use_is_one_sentence(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", "--no-auth", "--model", model, "--port", port]) == 1
    assert port in one_sentence(capsys)
