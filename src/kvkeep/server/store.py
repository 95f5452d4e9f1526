"""The tenant table in use: swapped as a whole when its file changes."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from kvkeep.engine.api import TenantTerms
from kvkeep.errors import ConfigError
from kvkeep.server.identity import LOCAL
from kvkeep.server.keys import key_digest, parse_key, same_digest
from kvkeep.server.tenants import KeyRecord, Tenant, TenantFile, TenantTable

_NOBODY = key_digest("")


class TenantStore:
    """Answers who holds a key, from memory; `reload` takes the file's state as a whole."""

    def __init__(self, table: TenantTable, file: TenantFile | None = None) -> None:
        self._file = file
        self._stamp = file.stamp() if file else None
        self._use(table)

    @classmethod
    def open(cls, path: Path, *, now: Callable[[], float] = time.time) -> TenantStore:
        """Return a store over a tenant file; raises `ConfigError` where it can't be used."""
        file = TenantFile(path, now=now)
        return cls(file.read(), file)

    @classmethod
    def local(cls) -> TenantStore:
        """Return the store for a server without authentication: one account, no keys."""
        return cls(
            TenantTable(scope_key=secrets.token_hex(32), tenants=(Tenant(name=LOCAL, share=1.0),))
        )

    @property
    def scope_key(self) -> bytes:
        """Return the key that scopes are derived with."""
        return self._scope_key

    def lookup(self, presented: str, now: float) -> tuple[Tenant, KeyRecord] | None:
        """Return a live key's tenant and record; one digest is compared whatever the outcome."""
        key = parse_key(presented)
        entry = self._keys.get(key.id) if key else None
        same = same_digest(key_digest(presented), entry[1].sha256 if entry else _NOBODY)
        return entry if same and entry is not None and entry[1].live(now) else None

    def live_keys(self, now: float) -> frozenset[str]:
        """Return the ids of all keys valid at `now`."""
        return frozenset(i for i, (_, record) in self._keys.items() if record.live(now))

    def quotas(self) -> dict[str, float]:
        """Return the share of every account that has one."""
        return {name: share for name, share in self._table.quotas().items() if share > 0}

    def accounts(self) -> dict[str, Tenant]:
        """Return each account with the tenant it belongs to."""
        return self._table.accounts()

    def terms(self) -> dict[str, TenantTerms]:
        """Return what is settled for each account beside its share."""
        return {name: tenant.terms() for name, tenant in self._table.accounts().items()}

    def shares(self) -> bool:
        """Return whether any tenant is in a group."""
        return self.largest_group() > 0

    def largest_group(self) -> int:
        """Return how many tenants the largest group has."""
        sizes = Counter(t.group for t in self._table.tenants if t.group is not None)
        return max(sizes.values(), default=0)

    def changed(self) -> bool:
        """Return whether the file differs from the one last looked at."""
        return self._file is not None and self._file.stamp() != self._stamp

    def reload(self) -> None:
        """Take the file's state; raises `ConfigError` and keeps the old one where it is bad."""
        if self._file is None:
            raise ConfigError(
                "tenants: this server runs without authentication and has no tenant file"
            )
        self._stamp = self._file.stamp()
        self._use(self._file.read())

    def _use(self, table: TenantTable) -> None:
        self._table = table
        self._scope_key = bytes.fromhex(table.scope_key)
        self._keys = {k.id: (t, k) for t in table.tenants for k in t.keys}
