"""One engine out of two: prompts are computed in the first, answers go on in the second."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, Self, TypeVar

import msgspec

from kvkeep.engine.api import (
    Chunk,
    ChunkStream,
    EngineClient,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Handover,
    ModelInfo,
    Purged,
    TenantTerms,
    TokenLogprob,
)
from kvkeep.errors import ConfigError, EngineError
from kvkeep.types import PAGE_TOKENS

LEAST_TOKENS: Final = 512
"""Shorter prompts are computed where they are answered."""
PATIENCE_S: Final = 120.0
"""A prompt that takes longer elsewhere is computed here."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class DecodeClient(EngineClient, Protocol):
    """An engine that goes on with what others have begun."""

    def begin(
        self, request_id: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> None:
        """Let a request go on after these tokens; none: it computes its prompt itself."""


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
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._least_tokens = max(least_tokens, PAGE_TOKENS)
        self._patience_s = patience_s
        self._link = ""
        self._max_model_len = 0

    async def info(self) -> ModelInfo:
        """Return the model's description; raises `ConfigError` where the two engines differ."""
        first, second = await asyncio.gather(self._prefill.info(), self._decode.info())
        for name in ("digest", "kv", "dtype", "evict", "shield", "max_model_len"):
            here, there = getattr(second, name), getattr(first, name)
            if here != there:
                raise ConfigError(
                    f"{name}: the decode worker has {here!r} and the prefill worker {there!r};"
                    " start both alike"
                )
        if not first.link:
            raise ConfigError("link: the prefill worker hands no pages over; give it an address")
        self._link, self._max_model_len = first.link, second.max_model_len
        return second

    def submit(self, request: GenerateRequest) -> ChunkStream:
        """Start a request; closing the stream early ends it in both engines."""
        if not self._splits(request):
            return self._decode.submit(request)
        if request.params.seed is None:  # both must draw the same
            params = msgspec.structs.replace(request.params, seed=secrets.randbits(63))
            request = msgspec.structs.replace(request, params=params)
        own = msgspec.structs.replace(request, handover=Handover(role="decode", link=self._link))
        there = msgspec.structs.replace(request, handover=Handover(role="prefill"))
        decode = self._decode.submit(own)
        try:
            prefill = self._prefill.submit(there)
        except EngineError as error:
            _note(error)
            self._decode.begin(request.id, (), ())
            return decode
        return _SplitStream(request, prefill, decode, self._decode.begin, self._patience_s)

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

    def _splits(self, request: GenerateRequest) -> bool:
        """Tell whether a request's prompt is computed elsewhere: a long one with one answer."""
        params, length = request.params, len(request.prompt_ids)
        single = params.n == 1 and not params.ranks and params.prompt_logprobs is None
        goes_on = params.max_tokens > 1 and length + 1 < self._max_model_len
        return bool(self._link) and single and goes_on and length >= self._least_tokens


async def _unless_down(call: Awaitable[T]) -> T | None:
    """Return what an engine answers; None where it is down: the other one serves alone then."""
    try:
        return await call
    except EngineError as error:
        _note(error)
        return None


def _note(error: EngineError) -> None:
    log.warning("the prefill engine does nothing: %s", error)


class _SplitStream:
    """One request's chunks: the first token's from one engine, the others' from the other."""

    def __init__(
        self,
        request: GenerateRequest,
        prefill: ChunkStream,
        decode: ChunkStream,
        begin: Callable[[str, tuple[int, ...], tuple[TokenLogprob, ...]], None],
        patience_s: float,
    ) -> None:
        self._request = request
        self._prefill = prefill
        self._decode = decode
        self._begin = begin
        self._patience_s = patience_s
        self._begun = False
        self._ended = False
        self._cached: int | None = None
        """Prompt tokens the prefill engine found; None: the decode engine says."""
        self._next: asyncio.Task[Chunk] | None = None
        """The decode engine's next chunk, waited for already."""

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Chunk:
        """Return the next chunk; raises `EngineError` where the decode engine has ended."""
        if self._ended:
            raise StopAsyncIteration
        if not self._begun:
            chunk = await self._first()
            if chunk is not None:
                return chunk
        return self._told(await self._next_decoded())

    async def aclose(self) -> None:
        """Stop reading; both engines end the request within a step."""
        self._ended = True
        await self._prefill.aclose()
        await self._decode.aclose()
        if self._next is not None:
            self._next.cancel()

    async def _first(self) -> Chunk | None:
        """Let the answer begin; return what there is to tell of the first token, if anything.

        A decode engine that speaks first has ended the request: its deadline, or it is refused.
        """
        first = asyncio.ensure_future(anext(self._prefill))
        self._next = asyncio.ensure_future(anext(self._decode))
        try:
            await asyncio.wait(
                (first, self._next),
                timeout=self._patience_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            if not first.done():
                first.cancel()
                await self._prefill.aclose()
        self._begun = True
        if self._next.done():
            await self._prefill.aclose()
            return None
        chunk = _chunk_of(first)
        if chunk is not None and chunk.finish is FinishReason.STOP:
            await self._decode.aclose()
            self._next.cancel()
            self._ended = True
            return chunk
        if chunk is None or not chunk.token_ids:
            self._begin(self._request.id, (), ())
            return None
        self._cached = chunk.cached_tokens
        self._begin(self._request.id, chunk.token_ids, chunk.logprobs)
        return msgspec.structs.replace(chunk, finish=None) if chunk.text else None

    async def _next_decoded(self) -> Chunk:
        waiting, self._next = self._next, None
        return await (anext(self._decode) if waiting is None else waiting)

    def _told(self, chunk: Chunk) -> Chunk:
        if self._cached is None:
            return chunk
        return msgspec.structs.replace(chunk, cached_tokens=self._cached)


def _chunk_of(first: asyncio.Future[Chunk]) -> Chunk | None:
    """Return a prefill engine's chunk; None where it gave none that can be gone on from."""
    if not first.done() or first.cancelled():
        return None
    try:
        chunk = first.result()
    except StopAsyncIteration:
        return None
    except EngineError as error:
        _note(error)
        return None
    good = chunk.finish in {FinishReason.LENGTH, FinishReason.STOP} and chunk.error is None
    return chunk if good else None
