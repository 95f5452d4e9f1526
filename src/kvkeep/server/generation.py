"""Runs one HTTP request's prompts on the engine and hands back what is new as soon as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from kvkeep.engine.api import Chunk, ChunkStream, EngineClient, FinishReason, GenerateRequest
from kvkeep.errors import DeadlineExceeded, RequestCancelled
from kvkeep.server.problems import GenerationFailed
from kvkeep.server.running import Job


class Event(NamedTuple):
    """Something new of one prompt of a request."""

    prompt: int
    chunk: Chunk


class Generation:
    """A context over the engine's iterators; leaving it, or cancelling the job, closes them."""

    def __init__(self, client: EngineClient, requests: Sequence[GenerateRequest], job: Job) -> None:
        self._client = client
        self._requests = requests
        self._job = job
        self._events: list[Event] = []
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._left = len(requests)
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._pumps = [asyncio.create_task(self._pump(i, r)) for i, r in enumerate(self._requests)]
        self._job.on_cancel(self._fail)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what the engine still does for the request."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def next(self, silence_s: float | None = None) -> list[Event] | None:
        """Return all that came since the last call, waiting for the first of it.

        An empty list after `silence_s` without any; None at the end. Raises what the engine raised,
        or what the job was cancelled with.
        """
        if not self._wake.is_set():
            try:
                async with asyncio.timeout(silence_s):
                    await self._wake.wait()
            except TimeoutError:
                return []
        self._job.check()
        events, self._events = self._events, []
        if events:
            if self._left and self._error is None:
                self._wake.clear()
            return events
        if self._error is not None:
            raise self._error
        return None

    async def _pump(self, prompt: int, request: GenerateRequest) -> None:
        chunks: ChunkStream | None = None
        unfinished = request.params.n
        try:
            chunks = self._client.submit(request)
            async for chunk in chunks:
                self._events.append(Event(prompt, chunk))
                unfinished -= chunk.finish is not None
                self._wake.set()
            if unfinished:
                self._fail(GenerationFailed("the engine ended the request before its last token"))
        except Exception as error:  # noqa: BLE001 - whatever it is, the request's handler raises it
            self._fail(error)
        finally:
            if chunks is not None:
                await chunks.aclose()
            self._left -= 1
            if self._left == 0:
                self._wake.set()

    def _fail(self, error: Exception) -> None:
        """Keep the first error and stop the other prompts: nobody will read them."""
        if self._error is None:
            self._error = error
        current = asyncio.current_task()
        for pump in self._pumps:
            if pump is not current:
                pump.cancel()
        self._wake.set()


def check_finish(chunk: Chunk) -> None:
    """Raise where a sequence ended in a way its client must hear of as an error."""
    if chunk.finish is FinishReason.ERROR:
        raise GenerationFailed(chunk.error or "the engine failed on this request")
    if chunk.finish is FinishReason.CANCELLED:
        raise RequestCancelled("cancelled by the engine")
    if chunk.finish is FinishReason.DEADLINE:
        raise DeadlineExceeded("the request's deadline passed")
