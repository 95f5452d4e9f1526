"""What both ports share: the engine's state, the tenants, the requests under way, counters."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum

import msgspec

from kvkeep.engine.api import EngineClient, ModelInfo, Purged
from kvkeep.errors import (
    ConfigError,
    EngineError,
    EngineStopped,
    InvalidRequest,
    KvkeepError,
    Unauthenticated,
)
from kvkeep.metrics import RELOAD_FAILURES, RELOADS, REVOKED, Metric
from kvkeep.server.identity import Authenticator, Headers, Identity, LoopbackAuthenticator
from kvkeep.server.logs import log_event
from kvkeep.server.options import ServerOptions
from kvkeep.server.problems import Unavailable
from kvkeep.server.running import Running
from kvkeep.server.store import TenantStore
from kvkeep.server.text import TextModel, TextWorkers


class Shredding(msgspec.Struct, frozen=True, kw_only=True):
    """What was destroyed and dropped of a tenant."""

    pages: int
    receipt: msgspec.Raw
    """Signed, as `kvkeep keys verify` reads it."""


class Health(StrEnum):
    """Where the server stands."""

    STARTING = "starting"
    OK = "ok"
    DRAINING = "draining"
    DEAD = "dead"


class Frontend:
    """The server's state; `alive` keeps it current."""

    def __init__(
        self, client: EngineClient, text: TextModel, tenants: TenantStore, options: ServerOptions
    ) -> None:
        self.client = client
        self.text = text
        self.tenants = tenants
        self.options = options
        self.running = Running()
        self.workers = TextWorkers(options.text_workers)
        self.counts: Counter[tuple[Metric, tuple[str, ...]]] = Counter()
        self._auth = (
            LoopbackAuthenticator(options.limits.no_auth_concurrency)
            if options.no_auth
            else Authenticator(tenants)
        )
        self._info: ModelInfo | None = None
        self._settled = asyncio.Event()
        self._start_error: KvkeepError | None = None
        self._dead = False
        self._draining = False

    @property
    def health(self) -> Health:
        """Return where the server stands."""
        if self._dead:
            return Health.DEAD
        if self._draining:
            return Health.DRAINING
        return Health.OK if self._info is not None else Health.STARTING

    def ready(self) -> ModelInfo:
        """Return the model's description; raises 503 unless requests can be served."""
        if self._info is None or self.health is not Health.OK:
            raise Unavailable(f"the server is {self.health.value}; try again later")
        return self._info

    @property
    def model(self) -> ModelInfo | None:
        """Return the model's description once it is loaded."""
        return self._info

    def names(self, info: ModelInfo) -> tuple[str, ...]:
        """Return the names that requests may ask for, the first of them the canonical one."""
        return self.options.served_names or (info.name,)

    def identify(self, headers: Headers, connection: str) -> Identity:
        """Return who asks; raises 401, 403 or 400."""
        return self._auth.identify(headers, connection)

    def quotas(self) -> dict[str, float]:
        """Return each account's part of the pool, what shared pages need left out."""
        shares = self.options.share_always or self.tenants.shares()
        left = 1.0 - self.options.share_pool if shares else 1.0
        return {name: share * left for name, share in self.tenants.quotas().items()}

    async def purge(self, name: str) -> Purged:
        """Drop what is kept of a tenant and its children; raises `InvalidRequest` for none."""
        accounts = [a for a, t in self.tenants.accounts().items() if name in (a, t.name)]
        if not accounts:
            raise InvalidRequest("there is no tenant of this name", param="tenant")
        done = [await self.client.purge(account) for account in accounts]
        return Purged(pages=sum(d.pages for d in done), votes=sum(d.votes for d in done))

    async def shred(self, name: str) -> Shredding:
        """Destroy the keys of a tenant's sealed pages, then drop what is kept of it in memory.

        Raises `InvalidRequest` where it has none.
        """
        if self.options.shred is None:
            raise InvalidRequest("this server seals no pages", param="tenant")
        try:
            receipt = await asyncio.to_thread(self.options.shred, name)
        except ConfigError as error:
            raise InvalidRequest(str(error), param="tenant") from None
        accounts = [a for a, t in self.tenants.accounts().items() if name in (a, t.name)]
        done = [await self.client.purge(account) for account in accounts]
        return Shredding(pages=sum(d.pages for d in done), receipt=msgspec.Raw(receipt))

    def count(self, metric: Metric, *labels: str) -> None:
        """Add one to a counter."""
        self.counts[metric, labels] += 1

    async def started(self) -> None:
        """Wait until requests are served; raises what the engine failed with instead."""
        await self._settled.wait()
        if self._start_error is not None:
            raise self._start_error

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self._draining = True

    def stop_running(self) -> None:
        """End every request under way: the drain's time is over."""
        self.running.cancel_where(
            lambda _: True, lambda: Unavailable("the server is shutting down; try again later")
        )

    def engine_died(self) -> None:
        """End every request under way, so that no client hangs."""
        if not self._dead:
            self._dead = True
            log_event("engine_died")
        self.running.cancel_where(lambda _: True, lambda: EngineStopped("the engine has stopped"))

    async def reload(self) -> None:
        """Take the tenant file; raises `ConfigError` and keeps the old state where it is bad."""
        try:
            self.tenants.reload()
            self.cancel_revoked()
            await self.client.set_tenants(self.quotas(), self.tenants.terms())
        except ConfigError:
            self.count(RELOAD_FAILURES)
            log_event("tenant_file_refused")
            raise
        self.count(RELOADS)

    def cancel_revoked(self) -> None:
        """Cancel what runs under keys that are no longer valid."""
        if self.options.no_auth:
            return
        live = self.tenants.live_keys(time.time())
        cancelled = self.running.cancel_where(
            lambda identity: identity.key_id not in live,
            lambda: Unauthenticated("this API key is no longer valid"),
        )
        self.counts[REVOKED, ()] += cancelled

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Keep the state current for as long as the context lasts."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.workers.close()

    async def _watch(self) -> None:
        try:
            info = await self.client.info()
            await self.client.set_tenants(self.quotas(), self.tenants.terms())
        except KvkeepError as error:
            log_event("engine_start_failed", type=type(error).__name__)
            self._start_error = error
            self.engine_died()
            return
        else:
            self._info = info
        finally:
            self._settled.set()
        while not self._dead:
            await asyncio.sleep(self.options.poll_s)
            await self._look()

    async def _look(self) -> None:
        try:
            if self.tenants.changed():
                await self.reload()
            self.cancel_revoked()
            await self.client.stats()
        except ConfigError:
            pass
        except EngineError:
            self.engine_died()
