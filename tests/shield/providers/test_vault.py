"""The transit provider against a stand-in for the service's HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield.keys import KeyClient
from kvkeep.shield.providers.vault import VaultProvider
from tests.shield.providers.transit import TOKEN, Transit, transit

KEY = memoryview(b"k" * 32)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transit]:
    monkeypatch.setenv("VAULT_TOKEN", TOKEN)
    with transit() as server:
        yield server


def opened(provider: VaultProvider, wrapped: bytes, label: bytes) -> bytes:
    into = bytearray(32)
    provider.unwrap(wrapped, label, memoryview(into))
    return bytes(into)


def test_keys_are_bound_to_their_label(service: Transit) -> None:
    provider = VaultProvider.connect(service.url, "kvkeep")
    wrapped = provider.wrap(KEY, b"acme")
    assert wrapped.startswith(b"vault:v1:")
    assert service.derived == {"kvkeep": True}
    assert opened(provider, wrapped, b"acme") == bytes(KEY)
    with pytest.raises(SealError, match="does not open"):
        opened(provider, wrapped, b"rival")
    assert opened(VaultProvider.connect(service.url, "kvkeep"), wrapped, b"acme") == bytes(KEY)
    other = VaultProvider.connect(service.url, "kvkeep")
    assert opened(provider, other.wrap(KEY, b"acme"), b"acme") == bytes(KEY)
    assert provider.destroy(b"acme") is False


def test_a_new_version_wraps_anew_and_the_old_still_opens(service: Transit) -> None:
    provider = VaultProvider.connect(service.url, "kvkeep")
    old = provider.wrap(KEY, b"acme")
    service.keys["kvkeep"].append(b"2" * 32)
    new = provider.rewrap(old, b"acme")
    assert new.startswith(b"vault:v2:")
    assert opened(provider, old, b"acme") == opened(provider, new, b"acme") == bytes(KEY)


def test_a_key_for_each_owner_dies_with_it_in_every_copy_of_the_store(service: Transit) -> None:
    provider = VaultProvider.connect(service.url, "kvkeep-*")
    copies = {owner: provider.wrap(KEY, owner) for owner in (b"acme", b"rival")}
    assert len(service.keys) == 2
    assert provider.destroy(b"acme") is True
    assert len(service.keys) == 1
    with pytest.raises(SealError):
        opened(provider, copies[b"acme"], b"acme")
    assert opened(provider, copies[b"rival"], b"rival") == bytes(KEY)


def test_a_key_that_is_not_derived_is_refused(service: Transit) -> None:
    service.keys["plain"], service.derived["plain"] = [b"1" * 32], False
    with pytest.raises(ConfigError, match="must be made with derived=true"):
        VaultProvider.connect(service.url, "plain").wrap(KEY, b"acme")


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_a_service_that_refuses_is_no_answer(service: Transit, status: int) -> None:
    provider = VaultProvider.connect(service.url, "kvkeep")
    wrapped = provider.wrap(KEY, b"acme")
    service.status = status
    with pytest.raises(SealError, match="vault"):
        opened(provider, wrapped, b"acme")


def test_a_service_that_is_away_is_no_answer(service: Transit) -> None:
    provider = VaultProvider.connect(service.url, "kvkeep")
    wrapped = provider.wrap(KEY, b"acme")
    service.server_close()
    with pytest.raises(KeysUnavailable, match="does not answer"):
        opened(provider, wrapped, b"acme")


def test_a_key_of_another_length_is_refused(service: Transit) -> None:
    provider = VaultProvider.connect(service.url, "kvkeep")
    wrapped = provider.wrap(memoryview(b"short"), b"acme")
    with pytest.raises(SealError, match="another length"):
        opened(provider, wrapped, b"acme")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://vault.example:8200", "use https"),
        ("vault.example", "with an https URL"),
        ("ftp://vault", "with an https URL"),
    ],
)
def test_an_address_that_would_leak_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        VaultProvider.connect(url, "kvkeep")


def test_a_missing_token_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VAULT_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="set VAULT_TOKEN"):
        VaultProvider.connect("https://127.0.0.1:1", "kvkeep")


def test_the_key_process_says_at_start_that_its_provider_is_down(
    service: Transit, tmp_path: Path
) -> None:
    service.status = 503
    client = KeyClient(f"vault:{service.url},kvkeep", str(tmp_path / "s"))
    with pytest.raises(ConfigError, match=r"vault can't be used now.*see that it runs"):
        client.start()
    service.status = None
    client = KeyClient(f"vault:{service.url},kvkeep", str(tmp_path / "s"))
    assert client.start().provider == "vault"
    client.close()
