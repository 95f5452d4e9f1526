"""One request's chunks, whatever becomes of the workers that it meets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final, Self

import msgspec

from kvkeep.disagg.crew import Crew
from kvkeep.disagg.guarding import Turn
from kvkeep.disagg.members import Member
from kvkeep.disagg.split import Way, single, split, splits
from kvkeep.engine.api import Chunk, ChunkStream, FinishReason, GenerateRequest, Handover
from kvkeep.errors import EngineError, EngineStopped, PrefillLost

MOST_ATTEMPTS: Final = 4
"""A request whose workers end each time may be why they do."""
MOST_PREFILLS: Final = 2
"""Of these, with a prefill worker."""
LATE_S: Final = 0.5
"""What a worker gets beyond a request's deadline to say so itself."""


class Journey:
    """A `ChunkStream`; its request has a seed, so that any worker draws the same tokens.

    Of a request with one answer, another worker computes prompt and told tokens in one go and
    goes on. Others are answered again from the start, and what was told is left out.
    """

    def __init__(
        self,
        request: GenerateRequest,
        crew: Crew,
        ended: Callable[[Journey], None],
        turn: Turn | None = None,
    ) -> None:
        """`ended` hears that no worker has anything of it any more.

        `turn` is its place in its tenant's guard, where there is one.
        """
        self.request = request
        self._crew = crew
        self._ended = ended
        self._turn = turn
        self._begun_s = asyncio.get_running_loop().time()
        self._single = single(request)
        self._told: tuple[int, ...] = ()
        """Tokens of a single answer that its client has had."""
        self._chunks: Counter[int] = Counter()
        """What its client has had, by sequence."""
        self._skip: Counter[int] = Counter()
        """Chunks that a successor tells once more."""
        self._cached: int | None = None
        self._attempts = 0
        self._most_prefills = MOST_PREFILLS
        self._left = request.params.n
        self._stream: ChunkStream | None = None
        self._decode: Member | None = None
        self._prefill: Member | None = None
        self._computing: Member | None = None

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Chunk:
        """Return the next chunk; raises `EngineStopped` where no worker could end the answer."""
        if not self._left:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout_at(self._ends_s()):
                while True:
                    told = self._tell(await self._next())
                    if told is not None:
                        break
        except TimeoutError:
            await self.aclose()
            return Chunk(finish=FinishReason.DEADLINE, cached_tokens=self._cached or 0)
        except EngineError:
            await self.aclose()
            raise
        self._left = 0 if told.error is not None else self._left - (told.finish is not None)
        if not self._left:
            await self.aclose()
        return told

    async def aclose(self) -> None:
        """Stop reading; its workers end the request within a step."""
        self._left = 0
        await self._let_go()
        self._ended(self)

    def purged(self) -> None:
        """Leave nothing behind on workers that take it over from now on."""
        self.request = msgspec.structs.replace(self.request, store=False)

    def _ends_s(self) -> float | None:
        deadline_s = self.request.deadline_s
        return None if deadline_s is None else self._begun_s + deadline_s + LATE_S

    async def _next(self) -> Chunk:
        """Return the next chunk of whatever worker there is."""
        while True:
            try:
                if self._stream is None:
                    self._stream = await self._begin()
                chunk = await anext(self._stream)
                self._waits_for(self._decode)
                if not chunk.again or self._attempts >= MOST_ATTEMPTS:
                    return chunk
                self._most_prefills = MOST_ATTEMPTS  # no decode worker has room for the prompt
                await self._let_go()
            except StopAsyncIteration:
                raise EngineStopped("the answer ended too early; send the request again") from None
            except PrefillLost as error:
                await self._lost(self._prefill, error)
            except EngineError as error:
                if self._decode is None:  # nobody is left
                    raise
                await self._lost(self._decode, error)

    async def _lost(self, member: Member | None, error: EngineError) -> None:
        """Take note of a dead worker; raises `EngineStopped` where enough of them have died."""
        if member is not None:
            self._crew.lost(member, error)
        await self._let_go()
        if self._attempts >= MOST_ATTEMPTS:
            raise EngineStopped(
                f"each of {self._attempts} workers that took the request up has ended;"
                " send it again later"
            )

    async def _begin(self) -> ChunkStream:
        """Start on the workers it is placed on, once it may and there is a decode worker."""
        if self._turn is not None:
            guarded = await self._turn.comes()
            self.request = msgspec.structs.replace(self.request, guarded=guarded)
        decode = await self._decode_worker()
        self._attempts += 1
        self._skip = Counter() if self._single else self._chunks.copy()
        self._decode = decode
        decode.take()
        return self._submit(decode)

    async def _decode_worker(self) -> Member:
        """Return it; raises `EngineStopped` where none came back in time."""
        crew, end = self._crew, asyncio.get_running_loop().time() + self._crew.options.return_s
        while True:
            try:
                return crew.find("decode", self.request.tenant, self.request.prompt_ids)
            except EngineStopped as error:
                if crew.closed:
                    raise
                try:
                    async with asyncio.timeout_at(end):
                        await crew.changed()
                except TimeoutError:
                    raise error from None

    def _submit(self, decode: Member) -> ChunkStream:
        request = self._again()
        prefill = self._prefill_of(request)
        self._waits_for(decode if prefill is None else prefill)
        if prefill is not None:
            self._prefill = prefill
            prefill.take()
            patience_s = self._crew.options.patience_s
            return split(
                request,
                prefill.client,
                decode.client,
                Way(prefill.info.link, patience_s, self._told, again=True),
            )
        if not self._told:
            stream = decode.client.submit(request)
            if self._turn is not None and sampled(request):
                self._turn.runs(decode.client.verdict(request.id))
            return stream
        alone = msgspec.structs.replace(request, handover=Handover(role="decode"))
        stream = decode.client.submit(alone)
        decode.client.begin(alone.id, self._told, (), counted=True)
        return stream

    def _again(self) -> GenerateRequest:
        """Return the request as it is put to the next worker."""
        request = self.request
        left_s = request.deadline_s
        if left_s is not None:
            left_s = max(0.0, self._begun_s + left_s - asyncio.get_running_loop().time())
        name = request.id if self._attempts == 1 else f"{request.id}~{self._attempts}"
        return msgspec.structs.replace(request, id=name, deadline_s=left_s)

    def _prefill_of(self, request: GenerateRequest) -> Member | None:
        """Return the worker that computes the prompt; None: the decode worker does."""
        if sampled(request):  # its shadow needs the prompt computed where it is answered
            return None
        options, info = self._crew.options, self._crew.info
        if self._attempts > self._most_prefills or not splits(request, info, options.least_tokens):
            return None
        try:
            return self._crew.find("prefill", request.tenant, request.prompt_ids)
        except EngineStopped:
            return None

    def _tell(self, chunk: Chunk) -> Chunk | None:
        """Return what the client hears of a chunk; None: it has heard it."""
        if self._skip[chunk.index] > 0:
            self._skip[chunk.index] -= 1
            return None
        self._chunks[chunk.index] += 1
        if self._single:
            self._told += chunk.token_ids
        if self._cached is None:
            self._cached = chunk.cached_tokens
        return msgspec.structs.replace(chunk, cached_tokens=self._cached)

    def _waits_for(self, member: Member | None) -> None:
        """Count the request as one that this worker computes for now; None: as nobody's."""
        if member is self._computing:
            return
        if self._computing is not None:
            self._computing.computing -= 1
        self._computing = member
        if member is not None:
            member.computing += 1

    async def _let_go(self) -> None:
        self._waits_for(None)
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()
        if self._turn is not None:
            self._turn.leave()
        for member in (self._decode, self._prefill):
            if member is not None:
                member.let_go()
        self._decode = self._prefill = None


def sampled(request: GenerateRequest) -> bool:
    """Tell whether a request is to carry a shadow."""
    return request.guarded is not None and request.guarded.sampled
