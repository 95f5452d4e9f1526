"""Whom an audit may ask, and as whom: the target, its consent, the tenants' keys."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from kvkeep.addresses import is_loopback
from kvkeep.config import CONSENT_PATH
from kvkeep.errors import AuditError, ConfigError

TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Account:
    """A tenant of the target."""

    name: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cast:
    """Who plays what."""

    victim: Account
    attacker: Account
    sybils: tuple[Account, ...] = ()
    """Further accounts of the attacker's."""


def cast_of(pairs: Sequence[str]) -> Cast:
    """Return the cast of `NAME=KEY` words: victim, attacker, then sybils.

    KEY may be `@FILE` or `env:VARIABLE`, which keeps it out of the list of processes.
    """
    accounts = []
    for number, pair in enumerate(pairs, 1):
        name, separator, value = pair.partition("=")
        if not separator or not name or not value:
            # The word may be a bare key: it is not repeated.
            raise ConfigError(
                f"key: number {number} must read NAME=KEY, NAME=@FILE or NAME=env:VAR"
            )
        accounts.append(Account(name, _key(name, value)))
    if len(accounts) < 2:
        raise ConfigError("key: an audit needs two tenants, a victim and an attacker; repeat --key")
    if len({a.name for a in accounts}) < len(accounts) or len({a.key for a in accounts}) < len(
        accounts
    ):
        raise ConfigError("key: two tenants have the same name or the same key; give each its own")
    victim, attacker, *sybils = accounts
    return Cast(victim, attacker, tuple(sybils))


def _key(name: str, value: str) -> str:
    if value.startswith("env:"):
        found = os.environ.get(value.removeprefix("env:"), "")
        if not found:
            raise ConfigError(f"key: the variable named for {name} is not set; export it first")
        return found
    if value.startswith("@"):
        try:
            return Path(value[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                f"key: can't read the file given for {name}; check its path"
            ) from None
    return value


def base_url(text: str) -> httpx.URL:
    """Return the target's root, without the `/v1` that clients are given."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise ConfigError("url: not a URL; write one such as http://127.0.0.1:8000") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError("url: needs http:// or https:// and a host")
    if url.userinfo:
        raise ConfigError("url: holds a user or password; give keys with --key NAME=KEY")
    path = url.path.rstrip("/").removesuffix("/v1")
    return url.copy_with(path=path or "/", query=None, fragment=None)


def new_client(
    url: httpx.URL, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Return a connection that reads no proxy and no credentials from the environment."""
    return httpx.AsyncClient(
        base_url=url,
        transport=transport,
        timeout=TIMEOUT_S,
        trust_env=False,
        follow_redirects=False,
    )


async def check_consent(client: httpx.AsyncClient, token: str | None) -> None:
    """Raise unless the target is this machine or serves the token at its well-known path."""
    if is_loopback(client.base_url.host):
        return
    if not token:
        raise ConfigError(
            f"consent: {client.base_url.host} is not this machine; let it serve a token at "
            f"{CONSENT_PATH} and repeat it with --consent"
        )
    try:
        answer = await client.get(CONSENT_PATH)
    except httpx.HTTPError:
        raise AuditError(f"url: no server answers at {client.base_url}; check it") from None
    served = answer.content.strip() if answer.status_code == httpx.codes.OK else b""
    if not hmac.compare_digest(served, token.strip().encode()):
        raise ConfigError(
            f"consent: the target does not serve this token at {CONSENT_PATH}; "
            "its operator must put it there"
        )
