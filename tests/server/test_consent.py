"""Consent to audits from other machines: shown where the operator said so, and only there."""

from __future__ import annotations

import httpx
import pytest

from kvkeep.audit.target import check_consent, new_client
from kvkeep.config import CONSENT_PATH
from kvkeep.errors import ConfigError
from kvkeep.server.app import create_app
from kvkeep.server.options import ServerOptions
from kvkeep.server.store import TenantStore
from tests.server.fakes import ByteText, FakeEngine

ELSEWHERE = httpx.URL("http://kvkeep.example.org")


def app_with(consent: str | None) -> httpx.ASGITransport:
    options = ServerOptions(audit_consent=consent)
    return httpx.ASGITransport(create_app(FakeEngine(), ByteText(), TenantStore.local(), options))


async def test_an_audit_finds_the_consent_it_repeats() -> None:
    async with new_client(ELSEWHERE, app_with("a-token-of-this-operator")) as client:
        await check_consent(client, "a-token-of-this-operator")
        with pytest.raises(ConfigError, match="does not serve this token"):
            await check_consent(client, "another-token")
        assert (await client.get("/v1/models")).status_code == 401, "nothing else is open"
        assert (await client.post(CONSENT_PATH)).status_code == 405


async def test_without_the_operators_word_there_is_no_consent() -> None:
    async with new_client(ELSEWHERE, app_with(None)) as client:
        assert (await client.get(CONSENT_PATH)).status_code == 401
        with pytest.raises(ConfigError, match="does not serve this token"):
            await check_consent(client, "a-token-of-this-operator")
