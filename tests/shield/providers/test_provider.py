from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError, SealError
from kvkeep.shield.providers.local import LocalProvider, make_key_file
from kvkeep.shield.providers.make import make_provider
from kvkeep.shield.providers.provider import located, parse_spec
from kvkeep.shield.secret import SecretRegion

HEX = "0f" * 32
KEY = memoryview(b"k" * 32)


@pytest.fixture
def region() -> Iterator[SecretRegion]:
    made = SecretRegion(8)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("file:/etc/kek", "file", ("/etc/kek",)),
        ("file:a,b", "file", ("a,b",)),
        ("env:NAME", "env", ("NAME",)),
        ("fd:5", "fd", ("5",)),
        ("fd:5@77", "fd", ("5@77",)),
        ("vault:https://v:8200,key", "vault", ("https://v:8200", "key")),
        ("kms:arn:aws:kms:eu:1:key/x", "kms", ("arn:aws:kms:eu:1:key/x",)),
        ("pkcs11:/m.so,token,label", "pkcs11", ("/m.so", "token", "label")),
    ],
)
def test_a_provider_is_named_in_a_word(text: str, kind: str, parts: tuple[str, ...]) -> None:
    spec = parse_spec(text)
    assert (spec.kind, spec.parts, str(spec)) == (kind, parts, text)


@pytest.mark.parametrize(
    "text", ["", "file", "file:", "paper:x", "vault:u", "vault:u,", "pkcs11:a,b", "fd:x", "fd:-1"]
)
def test_what_names_no_provider_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^shield_keys: "):
        parse_spec(text)


@pytest.mark.parametrize("raw", [bytes.fromhex(HEX), HEX.encode(), f"{HEX}\n".encode()])
def test_a_file_a_variable_and_a_descriptor_hold_the_same_key(
    raw: bytes, tmp_path: Path, region: SecretRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kek"
    path.write_bytes(raw)
    path.chmod(0o600)
    monkeypatch.setenv("SEALING_KEK", HEX)
    with path.open("rb") as file:
        own = located(parse_spec(f"fd:{file.fileno()}"))
        assert own.parts == (f"{file.fileno()}@{os.getpid()}",)
        assert located(own) is own
        specs = [parse_spec(f"file:{path}"), parse_spec("env:SEALING_KEK"), own]
        specs.append(parse_spec(f"fd:{file.fileno()}"))
        made = [make_provider(spec, region) for spec in specs]
    wrapped, into = made[0].wrap(KEY, b"label"), bytearray(32)
    for provider in made:
        provider.unwrap(wrapped, b"label", memoryview(into))
        assert into == bytes(KEY)
        into[:] = bytes(32)
        assert provider.rewrap(wrapped, b"label") == wrapped
        assert provider.destroy(b"label") is False
    with pytest.raises(SealError):
        made[0].unwrap(wrapped, b"other", memoryview(into))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env:NONE_SUCH", "the environment has no NONE_SUCH"),
        ("env:SHORT", "the variable SHORT holds no key"),
        ("fd:987", "can't read descriptor 987"),
        ("file:none", r"can't read none: .*`kvkeep keys init file:none` makes one"),
    ],
)
def test_what_holds_no_key_is_one_sentence(
    text: str, words: str, region: SecretRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT", "abc")
    before = region.free_slots
    with pytest.raises(ConfigError, match=words):
        make_provider(parse_spec(text), region)
    assert region.free_slots == before


def test_a_key_file_is_made_once_for_its_user(tmp_path: Path, region: SecretRegion) -> None:
    path = tmp_path / "deep" / "kek"
    make_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes()) == 32
    with pytest.raises(ConfigError, match="is there already"):
        make_key_file(path)
    with pytest.raises(ConfigError, match="can't write"):
        make_key_file(path / "below")
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="mode 0604; run chmod 600"):
        LocalProvider.of_file(path, region)


def test_services_are_made_by_name(region: SecretRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PKCS11_PIN", raising=False)
    made = make_provider(parse_spec("kms:arn:aws:kms:eu-central-1:123456789012:key/x"), region)
    assert made.destroy(b"label") is False
    with pytest.raises(ConfigError, match="set PKCS11_PIN"):
        make_provider(parse_spec("pkcs11:/m.so,token,label"), region)


@pytest.mark.parametrize(
    ("text", "package"),
    [("vault:https://v,k", "hvac"), ("kms:arn", "boto3"), ("pkcs11:m,t,l", "pkcs11")],
)
def test_a_service_whose_client_is_not_installed_names_the_extra(
    text: str, package: str, region: SecretRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = text.partition(":")[0]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"kvkeep.shield.providers.{kind}", raising=False)
    with pytest.raises(ConfigError, match=rf"install kvkeep\[{kind}\]"):
        make_provider(parse_spec(text), region)
