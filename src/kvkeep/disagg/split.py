"""One request's chunks out of two engines: the first token's from one, the others' from another."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Final, NamedTuple, Protocol, Self

import msgspec

from kvkeep.engine.api import (
    Chunk,
    ChunkStream,
    EngineClient,
    FinishReason,
    GenerateRequest,
    Handover,
    ModelInfo,
    TokenLogprob,
)
from kvkeep.engine.moments import Moments
from kvkeep.errors import EngineError, PrefillLost
from kvkeep.types import PAGE_TOKENS

KEY_BYTES: Final = 32
"""Of what pages are sealed under on their way."""

log = logging.getLogger(__name__)


class DecodeClient(EngineClient, Protocol):
    """An engine that goes on with what others have begun."""

    def begin(
        self,
        request_id: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        *,
        counted: bool = False,
    ) -> None:
        """Let a request go on after these tokens; none: it computes its prompt itself.

        `counted`: another engine that answered it has counted them.
        """


class Way(NamedTuple):
    """How a request is split."""

    link: str
    """Where its prompt's pages are handed over."""
    patience_s: float
    """A prompt that takes longer elsewhere is computed where it is answered."""
    told: tuple[int, ...] = ()
    """Tokens that its client has had from an engine that is gone."""
    again: bool = False
    """Whether another prefill engine may be asked once this one is gone."""
    whole: bool = False
    """Nothing of the prompt is sent before all of it is computed: a baseline."""


def single(request: GenerateRequest) -> bool:
    """Tell whether a request has one answer that an engine can go on with after another."""
    params = request.params
    return params.n == 1 and not params.ranks and params.prompt_logprobs is None


def splits(request: GenerateRequest, info: ModelInfo, least_tokens: int) -> bool:
    """Tell whether a request's prompt is worth computing elsewhere: a long one with one answer.

    Of one without a whole page nothing is sent, nor of one without a whole block where pages are
    coded and rows behind them can't be, nor of one that stores nothing. Of one whose answer is a
    single token nothing need be.
    """
    length = len(request.prompt_ids)
    whole = None if info.hands_rows else info.window_tokens
    least_tokens = max(least_tokens, whole or PAGE_TOKENS)
    fits = request.params.max_tokens > 1 and length + 1 < info.max_model_len
    goes_on = fits and request.store
    return single(request) and (goes_on or ends_at_once(request)) and length >= least_tokens


def ends_at_once(request: GenerateRequest) -> bool:
    """Tell whether a request's first token is its last: nobody goes on with it."""
    return request.params.max_tokens == 1


def split(
    request: GenerateRequest, prefill: EngineClient, decode: DecodeClient, way: Way
) -> ChunkStream:
    """Start a request in both engines; its seed is set, since both must draw the same.

    Both are given a new key for its pages' way, and no other engine is. Of one that ends at once
    nothing is sent: the second stands by. Raises `PrefillLost` with nothing left running.
    """
    key = secrets.token_bytes(KEY_BYTES)
    parts: tuple[Handover | None, Handover] = (
        Handover(role="prefill", key=key, whole=way.whole),
        Handover(role="decode", key=key, link=way.link),
    )
    if ends_at_once(request):
        parts = (None, Handover(role="decode"))
    there, own = (msgspec.structs.replace(request, handover=part) for part in parts)
    try:
        first = prefill.submit(there)
    except EngineError as error:
        if way.again:
            raise PrefillLost(str(error)) from None
        note(error)
        answer = decode.submit(own)
        decode.begin(request.id, way.told, (), counted=True)
        return answer
    try:
        answer = decode.submit(own)
    except EngineError as error:
        answer = _Gone(error)
    return SplitStream(request, first, answer, decode, way)


class _Gone:
    """What an engine answers that is gone."""

    def __init__(self, error: EngineError) -> None:
        self._error = error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        raise self._error

    async def aclose(self) -> None:
        """Nothing runs there."""


def note(error: EngineError) -> None:
    """Say that a prompt is computed where it is answered."""
    log.warning("the prefill engine does nothing: %s", error)


class SplitStream:
    """What a client hears; closing it early ends the request in both engines."""

    def __init__(
        self,
        request: GenerateRequest,
        prefill: ChunkStream,
        decode: ChunkStream,
        engine: DecodeClient,
        way: Way,
    ) -> None:
        self._request = request
        self._prefill = prefill
        self._decode = decode
        self._engine = engine
        self._way = way
        self._begun = False
        self._ended = False
        self._cached: int | None = None
        """Prompt tokens the prefill engine found; None: the decode engine says."""
        self._moments: tuple[Moments, ...] = ()
        """Of the prefill engine."""
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
        Where it stands by, that counts only if the prefill engine has no answer.
        """
        ends = ends_at_once(self._request)
        first = asyncio.ensure_future(anext(self._prefill))
        self._next = asyncio.ensure_future(anext(self._decode))
        try:
            await asyncio.wait(
                (first,) if ends else (first, self._next),
                timeout=self._way.patience_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            if not first.done():
                first.cancel()
                await self._prefill.aclose()
        self._begun = True
        if self._next.done() and not ends:
            await self._prefill.aclose()
            return None
        chunk = await self._chunk_of(first)
        if self._way.told:  # the client has had the first token
            self._cached = None if chunk is None else chunk.cached_tokens
            self._engine.begin(self._request.id, self._way.told, (), counted=True)
            return None
        told = chunk is not None and bool(chunk.token_ids)
        if chunk is not None and ((ends and told) or chunk.finish is FinishReason.STOP):
            self._engine.begin(self._request.id, chunk.token_ids, chunk.logprobs)  # it counts
            await self._decode.aclose()
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
            self._ended = True
            return chunk
        if chunk is None or not chunk.token_ids:
            self._engine.begin(self._request.id, (), ())
            return None
        self._cached, self._moments = chunk.cached_tokens, chunk.moments
        self._engine.begin(self._request.id, chunk.token_ids, chunk.logprobs)
        return msgspec.structs.replace(chunk, finish=None, moments=()) if chunk.text else None

    async def _chunk_of(self, first: asyncio.Future[Chunk]) -> Chunk | None:
        """Return a prefill engine's chunk; None where it gave none that can be gone on from."""
        if not first.done() or first.cancelled():
            return None
        try:
            chunk = first.result()
        except StopAsyncIteration:
            return None
        except EngineError as error:
            if self._way.again:
                await self.aclose()
                raise PrefillLost(str(error)) from None
            note(error)
            return None
        good = chunk.finish in {FinishReason.LENGTH, FinishReason.STOP} and chunk.error is None
        return chunk if good else None

    async def _next_decoded(self) -> Chunk:
        waiting, self._next = self._next, None
        return await (anext(self._decode) if waiting is None else waiting)

    def _told(self, chunk: Chunk) -> Chunk:
        if self._cached is None:
            return chunk
        moments = self._moments + chunk.moments if chunk.moments else ()
        return msgspec.structs.replace(chunk, cached_tokens=self._cached, moments=moments)
