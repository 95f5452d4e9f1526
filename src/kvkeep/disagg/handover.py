"""One engine out of two: prompts are computed in the first, answers go on in the second."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from typing import Final, TypeVar

import msgspec

from kvkeep.disagg.split import DecodeClient, Way, note, split, splits
from kvkeep.engine.api import (
    ChunkStream,
    EngineClient,
    EngineStats,
    GenerateRequest,
    ModelInfo,
    Purged,
    TenantTerms,
)
from kvkeep.errors import ConfigError, EngineError

LEAST_TOKENS: Final = 512
"""Shorter prompts are computed where they are answered."""
PATIENCE_S: Final = 120.0
"""A prompt that takes longer elsewhere is computed here."""

PAIRED: Final = (
    "digest",
    "kv",
    "dtype",
    "evict",
    "evict_rule",
    "shield",
    "sealer",
    "max_model_len",
)
"""What a prefill and a decode engine have in common."""

T = TypeVar("T")


class SplitClient:
    """An `EngineClient` over a prefill engine and a decode engine.

    Whatever becomes of the first, the second can do all: no request depends on it.
    """

    def __init__(
        self,
        prefill: EngineClient,
        decode: DecodeClient,
        *,
        least_tokens: int = LEAST_TOKENS,
        patience_s: float = PATIENCE_S,
        whole: bool = False,
    ) -> None:
        """`whole`: nothing of a prompt is sent before all of it is computed, as a baseline."""
        self._prefill = prefill
        self._decode = decode
        self._least_tokens = least_tokens
        self._patience_s = patience_s
        self._whole = whole
        self._link = ""
        self._info: ModelInfo | None = None

    async def info(self) -> ModelInfo:
        """Return the model's description; raises `ConfigError` where the two engines differ."""
        first, second = await asyncio.gather(self._prefill.info(), self._decode.info())
        for name in PAIRED:
            here, there = getattr(second, name), getattr(first, name)
            if here != there:
                raise ConfigError(
                    f"{name}: the decode worker has {here!r} and the prefill worker {there!r};"
                    " start both alike"
                )
        if not first.link:
            raise ConfigError("link: the prefill worker hands no pages over; give it an address")
        self._link, self._info = first.link, second
        return second

    def submit(self, request: GenerateRequest) -> ChunkStream:
        """Start a request; closing the stream early ends it in both engines."""
        if self._info is None or not splits(request, self._info, self._least_tokens):
            return self._decode.submit(request)
        if request.params.seed is None:  # both must draw the same
            params = msgspec.structs.replace(request.params, seed=secrets.randbits(63))
            request = msgspec.structs.replace(request, params=params)
        way = Way(self._link, self._patience_s, whole=self._whole)
        return split(request, self._prefill, self._decode, way)

    async def stats(self) -> EngineStats:
        """Return the decode engine's counters and gauges."""
        return await self._decode.stats()

    async def set_tenants(
        self, quotas: dict[str, float], terms: dict[str, TenantTerms] | None = None
    ) -> None:
        """Set each tenant's share and terms in both engines."""
        await asyncio.gather(
            self._decode.set_tenants(quotas, terms),
            _unless_down(self._prefill.set_tenants(quotas, terms)),
        )

    async def purge(self, tenant: str) -> Purged:
        """Drop a tenant's cached pages and votes in both engines."""
        here, there = await asyncio.gather(
            self._decode.purge(tenant), _unless_down(self._prefill.purge(tenant))
        )
        gone = there or Purged(pages=0, votes=0)
        return Purged(pages=here.pages + gone.pages, votes=here.votes + gone.votes)

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Stop taking requests, wait up to `drain_s` for those running, and end both."""
        await self._decode.close(drain_s=drain_s)
        await self._prefill.close()


async def _unless_down(call: Awaitable[T]) -> T | None:
    """Return what an engine answers; None where it is down: the other one serves alone then."""
    try:
        return await call
    except EngineError as error:
        note(error)
        return None
