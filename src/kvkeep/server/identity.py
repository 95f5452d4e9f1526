"""Who is asking: a key, a gateway's assertion or a connection becomes an account and a scope."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from kvkeep.errors import Forbidden, InvalidRequest, Unauthenticated
from kvkeep.server.tenants import NAME, KeyRecord, Tenant

LOCAL = "local"
"""The one account there is without authentication."""

_FORWARDING = (
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
    "via",
)
_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+=/-]{0,127}")
_SALT = re.compile(r"[\x21-\x7e]{1,256}")
_LOOPBACK_HOST = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller."""

    account: str
    """Whose quota pays: a tenant, or `gateway/child`."""
    key_id: str
    concurrency: int
    subject: str | None = None
    """A gateway's end user, or the connection without authentication: own scope, shared quota."""
    salt: str | None = None
    """From the header; one in the body narrows further."""
    store: bool = True
    """Whether what it sends may stay cached."""
    evict: bool = True
    """Whether tokens of it may be evicted."""


class Headers(Protocol):
    """A request's headers, names in lower case."""

    def getlist(self, key: str) -> list[str]:
        """Return every value of this name."""


class KeyTable(Protocol):
    """Who holds which key now."""

    def lookup(self, presented: str, now: float) -> tuple[Tenant, KeyRecord] | None:
        """Return the tenant and the record of a live key."""


def derive_scope(scope_key: bytes, account: str, subject: str | None, salts: Iterable[str]) -> str:
    """Return an opaque name of a cache scope: keyed, and different for any two different inputs."""
    h = hashlib.blake2b(key=scope_key[:64], digest_size=24, person=b"kvkeep-scope")
    for part in (account, subject, *salts):
        raw = b"" if part is None else part.encode()
        h.update((b"\0" if part is None else b"\1") + len(raw).to_bytes(8, "little") + raw)
    return "s" + h.hexdigest()


def check_salt(value: object, param: str) -> str:
    """Return a salt, or raise: a malformed one must never leave a request unsalted."""
    if not isinstance(value, str) or _SALT.fullmatch(value) is None:
        raise InvalidRequest(
            "must be 1 to 256 visible ASCII characters; leave it out for none", param=param
        )
    return value


class Authenticator:
    """Turns a request's headers into an identity."""

    def __init__(self, keys: KeyTable, *, now: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._now = now

    def identify(self, headers: Headers, connection: str) -> Identity:
        """Return who asks; raises 401, 403 or 400."""
        authorization = _single(headers, "authorization")
        scheme, _, token = (authorization or "").partition(" ")
        found = (
            self._keys.lookup(token.strip(), self._now()) if scheme.lower() == "bearer" else None
        )
        if found is None:
            raise Unauthenticated(
                "send a valid API key as `Authorization: Bearer kvk_...`", param="Authorization"
            )
        tenant, key = found
        child, subject = _single(headers, "x-kvkeep-tenant"), _single(headers, "x-kvkeep-subject")
        if not tenant.gateway:
            for name, value in (("X-Kvkeep-Tenant", child), ("X-Kvkeep-Subject", subject)):
                if value is not None:
                    raise Forbidden(
                        "this key is not a gateway's and may not assert an identity", param=name
                    )
        if subject is not None and _SUBJECT.fullmatch(subject) is None:
            raise InvalidRequest(
                "must be 1 to 128 letters, digits or _.:@+=/-", param="X-Kvkeep-Subject"
            )
        account, concurrency = _account(tenant, child)
        return Identity(
            account, key.id, concurrency, subject, _header_salt(headers),
            store=_may(headers, "X-Kvkeep-Store"), evict=_may(headers, "X-Kvkeep-Evict"),
        )  # fmt: skip


class LoopbackAuthenticator:
    """Gives each connection its own scope, nobody authenticating; for a loopback port only."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency

    def identify(self, headers: Headers, connection: str) -> Identity:
        """Return the connection's identity; raises 403 for a proxy's or a foreign host name's."""
        for name in _FORWARDING:
            if headers.getlist(name):
                raise Forbidden(
                    "a forwarded request needs authentication: start without --no-auth", param=name
                )
        for name in ("X-Kvkeep-Tenant", "X-Kvkeep-Subject"):
            if headers.getlist(name.lower()):
                raise Forbidden("nobody may assert an identity without authentication", param=name)
        host = _single(headers, "host")
        if host is None or _LOOPBACK_HOST.fullmatch(host.lower()) is None:
            raise Forbidden(
                "without authentication only a loopback host name is served", param="Host"
            )
        return Identity(
            LOCAL, LOCAL, self._concurrency, connection, _header_salt(headers),
            store=_may(headers, "X-Kvkeep-Store"), evict=_may(headers, "X-Kvkeep-Evict"),
        )  # fmt: skip


def _account(tenant: Tenant, child: str | None) -> tuple[str, int]:
    if child is None:
        if sum(tenant.children.values()) >= 1:
            raise Forbidden(
                "this gateway's share belongs to its children: name one", param="X-Kvkeep-Tenant"
            )
        return tenant.name, tenant.concurrency
    if NAME.fullmatch(child) is None:
        raise InvalidRequest("must be 1 to 63 letters, digits or _.-", param="X-Kvkeep-Tenant")
    fraction = tenant.children.get(child)
    if fraction is None:
        raise Forbidden(
            "names no child of this gateway; add it to the tenant file", param="X-Kvkeep-Tenant"
        )
    return f"{tenant.name}/{child}", max(1, int(tenant.concurrency * fraction))


def _header_salt(headers: Headers) -> str | None:
    value = _single(headers, "x-cache-salt")
    return None if value is None else check_salt(value, "X-Cache-Salt")


def _may(headers: Headers, name: str) -> bool:
    """Tell whether a header does not forbid; a word that is not known must not be taken for yes."""
    value = _single(headers, name.lower())
    if value not in (None, "never"):
        raise InvalidRequest("must be 'never'; leave the header out to allow it", param=name)
    return value is None


def _single(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequest("this header may be sent once only", param=name)
    return values[0] if values else None
