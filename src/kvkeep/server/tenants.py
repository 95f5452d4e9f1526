"""The tenant file: who may use the server, with which keys and which share of the page pool."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from kvkeep.engine.api import TenantTerms
from kvkeep.errors import ConfigError
from kvkeep.files import replace_file
from kvkeep.server.keys import ApiKey, key_digest, new_key

LIVE_KEYS = 2
"""Keys of a tenant that may be valid at one time: the one in use and its successor."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""A tenant's or a gateway child's name; `/` is left to join the two."""

_SHARE_SLACK = 1e-9


Store = Literal["never", "memory", "disk"]


@dataclass(frozen=True, slots=True)
class SharingTerms:
    """What a new tenant shares and keeps; see `Tenant`."""

    group: str | None = None
    contribute: bool = True
    consume: bool = True
    store: Store = "disk"
    ttl_s: float | None = None
    coded: bool = True
    evict: bool = True


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One key as stored; times are seconds since the epoch."""

    id: str
    sha256: str
    created: float
    expires: float | None = None

    def live(self, now: float) -> bool:
        """Return whether the key may be used at `now`."""
        return self.expires is None or now < self.expires


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant: its reserved share of the pool, its cap on requests at a time, its keys."""

    name: str
    share: float
    concurrency: int = 64
    gateway: bool = False
    children: dict[str, float] = msgspec.field(default_factory=dict)
    """A gateway's own tenants and the fraction of its share for each; the rest is its own."""
    keys: tuple[KeyRecord, ...] = ()
    group: str | None = None
    """Tenants it shares with; None: nobody."""
    contribute: bool = True
    """Whether its prompts count towards sharing."""
    consume: bool = True
    """Whether it reads what its group shares."""
    store: Store = "disk"
    """How far down its cached pages may go."""
    ttl_s: float | None = None
    """Seconds without use after which its pages go."""
    coded: bool = True
    """Whether its long requests are coded, under `kv = auto`."""
    evict: bool = True
    """Whether tokens of its requests may be evicted, where an engine does so."""

    def terms(self) -> TenantTerms:
        """Return what the engine needs to know beside the share."""
        return TenantTerms(
            voter=self.name,
            group=self.group,
            contribute=self.contribute,
            consume=self.consume,
            store=self.store,
            ttl_s=self.ttl_s,
            coded=self.coded,
            evict=self.evict,
        )


class TenantTable(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file; `scope_key` (hex) keys the names of cache scopes."""

    scope_key: str
    tenants: tuple[Tenant, ...] = ()

    def find(self, name: str) -> Tenant | None:
        """Return the tenant of this name."""
        return next((t for t in self.tenants if t.name == name), None)

    def accounts(self) -> dict[str, Tenant]:
        """Return each account with the tenant it belongs to."""
        return {
            f"{t.name}/{c}" if c else t.name: t for t in self.tenants for c in ("", *t.children)
        }

    def quotas(self) -> dict[str, float]:
        """Return the reserved share of every account: tenants, and the children of gateways."""
        quotas: dict[str, float] = {}
        for tenant in self.tenants:
            quotas[tenant.name] = tenant.share * max(0.0, 1.0 - sum(tenant.children.values()))
            for child, fraction in tenant.children.items():
                quotas[f"{tenant.name}/{child}"] = tenant.share * fraction
        return quotas


def check_table(table: TenantTable) -> None:
    """Raise `ConfigError` naming the first thing that is wrong."""
    names = [t.name for t in table.tenants]
    if len(set(names)) != len(names):
        raise ConfigError("tenants: two tenants have the same name; rename one")
    ids = [k.id for t in table.tenants for k in t.keys]
    if len(set(ids)) != len(ids):
        raise ConfigError("keys: two keys have the same id; rotate one of them")
    for tenant in table.tenants:
        _check_tenant(tenant)
    total = sum(t.share for t in table.tenants)
    if total > 1 + _SHARE_SLACK:
        raise ConfigError(f"share: the tenants' shares add up to {total:g}; lower them to 1 in all")
    if len(table.scope_key) < 32 or re.fullmatch(r"(?:[0-9a-f]{2})+", table.scope_key) is None:
        raise ConfigError("scope_key: must be at least 16 bytes in hex")


def _check_tenant(tenant: Tenant) -> None:
    for name in (tenant.name, *tenant.children):
        if NAME.fullmatch(name) is None:
            raise ConfigError(
                "name: use at most 63 letters, digits, '_', '.' and '-', a letter or digit first"
            )
    if not 0 < tenant.share <= 1:
        raise ConfigError(f"share: tenant {tenant.name} needs a share above 0 and at most 1")
    if tenant.group is not None and NAME.fullmatch(tenant.group) is None:
        raise ConfigError(
            f"group: of tenant {tenant.name}: use at most 63 letters, digits, '_', '.' and '-'"
        )
    if tenant.ttl_s is not None and not 0 < tenant.ttl_s < float("inf"):
        raise ConfigError(
            f"ttl_s: tenant {tenant.name} needs seconds above 0; leave it out for none"
        )
    if tenant.concurrency < 1:
        raise ConfigError(f"concurrency: tenant {tenant.name} needs at least 1")
    if tenant.children and not tenant.gateway:
        raise ConfigError(
            f"children: tenant {tenant.name} is no gateway; add --gateway or leave them out"
        )
    if any(not 0 < f <= 1 for f in tenant.children.values()):
        raise ConfigError(
            f"children: each child of {tenant.name} needs a fraction above 0 and at most 1"
        )
    if sum(tenant.children.values()) > 1 + _SHARE_SLACK:
        raise ConfigError(
            f"children: the fractions of {tenant.name} add up to more than 1; lower them"
        )


@dataclass(slots=True)
class _Cell:
    table: TenantTable


class TenantFile:
    """Reads and edits a tenant file: mode 0600, one writer at a time, replaced as a whole."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._now = now

    def stamp(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does; None where there is none."""
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def read(self) -> TenantTable:
        """Return the checked table; raises `ConfigError` for a missing, open or malformed file."""
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                if mode & 0o177:
                    raise ConfigError(f"{self.path} has mode {mode:04o}; run chmod 600 on it")
                raw = file.read()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path} does not exist; create it with `kvkeep tenant add NAME`"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.path} can't be read: {error.strerror}") from None
        try:
            table = msgspec.json.decode(raw, type=TenantTable)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{self.path} is no valid tenant file: {error}") from None
        check_table(table)
        return table

    def list(self) -> tuple[Tenant, ...]:
        """Return the tenants in the order they were added; none where there is no file yet."""
        return self.read().tenants if self.path.exists() else ()

    def add(
        self,
        name: str,
        *,
        share: float,
        concurrency: int = 64,
        gateway: bool = False,
        children: dict[str, float] | None = None,
        expires_s: float | None = None,
        sharing: SharingTerms | None = None,
    ) -> ApiKey:
        """Add a tenant and return its first key; the file is created where there is none."""
        terms = sharing or SharingTerms()
        key = new_key()
        with self._editing() as cell:
            if any(t.name == name for t in cell.table.tenants):
                raise ConfigError(
                    f"name: tenant {name} exists; `kvkeep tenant rotate {name}` makes a new key"
                )
            tenant = Tenant(
                name=name,
                share=share,
                concurrency=concurrency,
                gateway=gateway,
                children=children or {},
                keys=(self._record(key, expires_s),),
                group=terms.group,
                contribute=terms.contribute,
                consume=terms.consume,
                store=terms.store,
                ttl_s=terms.ttl_s,
                coded=terms.coded,
                evict=terms.evict,
            )
            cell.table = msgspec.structs.replace(cell.table, tenants=(*cell.table.tenants, tenant))
        return key

    def rotate(
        self, name: str, *, overlap_s: float = 86_400.0, expires_s: float | None = None
    ) -> ApiKey:
        """Return a new key; the newest old one lives on for `overlap_s`, any other is revoked."""
        key, now = new_key(), self._now()

        def change(tenant: Tenant) -> Tenant:
            live = sorted((k for k in tenant.keys if k.live(now)), key=lambda k: k.created)
            kept = (
                tuple(_ending(k, now + overlap_s) for k in live[1 - LIVE_KEYS :])
                if overlap_s > 0
                else ()
            )
            return msgspec.structs.replace(tenant, keys=(*kept, self._record(key, expires_s)))

        self._change(name, change)
        return key

    def revoke(self, name: str, key_id: str | None = None) -> None:
        """Remove one key, or the tenant with all of its keys; what runs under them is cancelled."""

        def change(tenant: Tenant) -> Tenant | None:
            if key_id is None:
                return None
            if all(k.id != key_id for k in tenant.keys):
                raise ConfigError(f"key: tenant {name} has no such key; see `kvkeep tenant list`")
            return msgspec.structs.replace(
                tenant, keys=tuple(k for k in tenant.keys if k.id != key_id)
            )

        self._change(name, change)

    def change(self, name: str, **terms: object) -> None:
        """Change fields of a tenant, those of `Tenant` but for its name and keys."""
        self._change(name, lambda tenant: msgspec.structs.replace(tenant, **terms))

    def _change(self, name: str, change: Callable[[Tenant], Tenant | None]) -> None:
        with self._editing() as cell:
            if all(t.name != name for t in cell.table.tenants):
                raise ConfigError(f"name: there is no tenant {name}; see `kvkeep tenant list`")
            changed = (change(t) if t.name == name else t for t in cell.table.tenants)
            cell.table = msgspec.structs.replace(
                cell.table, tenants=tuple(t for t in changed if t is not None)
            )

    def _record(self, key: ApiKey, expires_s: float | None) -> KeyRecord:
        now = self._now()
        expires = None if expires_s is None else now + expires_s
        return KeyRecord(id=key.id, sha256=key_digest(key.text), created=now, expires=expires)

    @contextmanager
    def _editing(self) -> Iterator[_Cell]:
        """Hold the lock, yield the table to be replaced, and write it at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            table = (
                self.read() if self.path.exists() else TenantTable(scope_key=secrets.token_hex(32))
            )
            cell = _Cell(table)
            yield cell
            check_table(cell.table)
            replace_file(
                self.path, msgspec.json.format(msgspec.json.encode(cell.table), indent=2) + b"\n"
            )
        finally:
            os.close(lock)


def _ending(key: KeyRecord, at: float) -> KeyRecord:
    expires = at if key.expires is None else min(at, key.expires)
    return msgspec.structs.replace(key, expires=expires)
