"""The KMS provider against moto's service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield.providers.kms import KmsProvider

KEY = memoryview(b"k" * 32)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        yield boto3.client("kms", region_name="eu-central-1")


@pytest.fixture
def provider(service: Any) -> KmsProvider:
    return KmsProvider.connect(service.create_key()["KeyMetadata"]["Arn"])


def opened(provider: KmsProvider, wrapped: bytes, label: bytes) -> bytes:
    into = bytearray(32)
    provider.unwrap(wrapped, label, memoryview(into))
    return bytes(into)


def test_keys_are_bound_to_their_label(provider: KmsProvider) -> None:
    wrapped = provider.wrap(KEY, b"acme")
    assert opened(provider, wrapped, b"acme") == bytes(KEY)
    with pytest.raises(SealError, match="does not open"):
        opened(provider, wrapped, b"rival")
    again = provider.rewrap(wrapped, b"acme")
    assert again != wrapped
    assert opened(provider, again, b"acme") == bytes(KEY)
    assert provider.destroy(b"acme") is False


def test_a_key_that_is_not_there_is_no_answer(service: Any) -> None:
    provider = KmsProvider.connect("arn:aws:kms:eu-central-1:123456789012:key/none")
    with pytest.raises(KeysUnavailable, match="KMS refuses: NotFoundException"):
        provider.wrap(KEY, b"acme")


def test_a_key_of_another_length_is_refused(provider: KmsProvider) -> None:
    wrapped = provider.wrap(memoryview(b"short"), b"acme")
    with pytest.raises(SealError, match="another length"):
        opened(provider, wrapped, b"acme")


def test_a_service_that_is_away_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    provider = KmsProvider.connect("arn:aws:kms:eu-central-1:123456789012:key/one")
    with pytest.raises(KeysUnavailable, match="does not answer"):
        provider.wrap(KEY, b"acme")


@pytest.mark.parametrize("name", ["alias/one", "arn:aws:s3:::bucket", "arn:aws:kms::1:key/x"])
def test_what_is_no_key_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="kms is written kms:arn"):
        KmsProvider.connect(name)
