"""The Python API: `Engine` for asyncio code, `LLM` for scripts and notebooks."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from kvkeep.engine.api import (
    Chunk,
    EngineClient,
    EngineStats,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
)
from kvkeep.engine.local import local_engine
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.process import spawn_engine
from kvkeep.errors import EngineError
from kvkeep.models import hub
from kvkeep.models.text import TextModel

TENANT = "local"
T = TypeVar("T")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    prompt_tokens: int
    cached_tokens: int
    score: float | None = None
    """A beam's score, or the mean log-probability per token of one of `best_of`."""


class Engine:
    """An engine for asyncio code, with one tenant unless told otherwise.

    Use as an async context manager:

        async with Engine("path/to/checkpoint") as engine:
            async for chunk in engine.stream("Once upon a time"):
                print(chunk.text, end="")
    """

    def __init__(self, model: str, *, in_process: bool = True, **options: Any) -> None:
        """`options` are the fields of `EngineOptions`; an unknown one is a `TypeError`."""
        self._options = EngineOptions(model=model, **options)
        self._in_process = in_process
        self._client: EngineClient | None = None
        self._text: TextModel | None = None

    async def __aenter__(self) -> Self:
        """Load the model."""
        start = local_engine if self._in_process else spawn_engine
        self._client = start(self._options)
        try:
            await self._client.info()
            await self._client.set_tenants({TENANT: 1.0})
            path = hub.resolve(self._options.model, allow_download=self._options.allow_download)
            self._text = TextModel.load(path)
        except BaseException:
            await self._client.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the engine; running requests are cancelled."""
        await self._running().close()

    @property
    def text(self) -> TextModel:
        """Return the tokenizer and chat template."""
        if self._text is None:
            raise EngineError("the engine is not running: enter it with `async with` first")
        return self._text

    async def info(self) -> ModelInfo:
        """Return the model's description."""
        return await self._running().info()

    async def stats(self) -> EngineStats:
        """Return counters and gauges."""
        return await self._running().stats()

    async def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        scope: str = "default",
    ) -> AsyncIterator[Chunk]:
        """Yield chunks as they come; pages are reused only within `scope`."""
        ids = self.text.encode(prompt) if isinstance(prompt, str) else prompt
        request = GenerateRequest(
            id=secrets.token_hex(12),
            tenant=TENANT,
            scope=scope,
            prompt_ids=tuple(ids),
            params=params or SamplingParams(),
        )
        async with aclosing(self._running().submit(request)) as chunks:
            async for chunk in chunks:
                if chunk.error is not None:
                    raise EngineError(chunk.error)
                yield chunk

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        scope: str = "default",
    ) -> Completion:
        """Return the whole answer (the first of `n`, the best of `best_of`)."""
        return (await self.generate_all(prompt, params, scope=scope))[0]

    async def generate_all(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        scope: str = "default",
    ) -> list[Completion]:
        """Return all `n` answers, the best first where they are ranked."""
        ids = self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        chunks: list[list[Chunk]] = [[] for _ in range(params.n if params else 1)]
        async for chunk in self.stream(ids, params, scope=scope):
            chunks[chunk.index].append(chunk)
        return [_completion(one, len(ids)) for one in chunks]

    async def beam_search(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        beam_width: int = 4,
        scope: str = "default",
    ) -> list[Completion]:
        """Return the `beam_width` best answers a beam search finds, best first."""
        searched = msgspec.structs.replace(
            params or SamplingParams(), n=beam_width, use_beam_search=True
        )
        return await self.generate_all(prompt, searched, scope=scope)

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        scope: str = "default",
    ) -> Completion:
        """Return the answer to a conversation, rendered with the model's chat template."""
        return await self.generate(self.text.apply_chat(messages), params, scope=scope)

    def _running(self) -> EngineClient:
        if self._client is None:
            raise EngineError("the engine is not running: enter it with `async with` first")
        return self._client


class LLM:
    """An engine for plain scripts; calls block. Close it, or use it as a context manager."""

    def __init__(self, model: str, **options: Any) -> None:
        """Load the model; `options` are the fields of `EngineOptions`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._engine = Engine(model, **options)
        self._open = True
        try:
            self._run(self._engine.__aenter__())
        except BaseException:
            self._stop()
            raise

    def generate(
        self, prompts: str | Sequence[str], params: SamplingParams | None = None, **changes: Any
    ) -> list[Completion]:
        """Return one answer per prompt, run as one batch; `changes` set fields of `params`."""
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        chosen = msgspec.structs.replace(params or SamplingParams(), **changes)
        return self._run(_gather([self._engine.generate(p, chosen) for p in batch]))

    def beam_search(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        beam_width: int = 4,
        **changes: Any,
    ) -> list[list[Completion]]:
        """Return the `beam_width` best answers of each prompt, best first, run as one batch."""
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        chosen = msgspec.structs.replace(params or SamplingParams(), **changes)
        search = self._engine.beam_search
        return self._run(_gather([search(p, chosen, beam_width=beam_width) for p in batch]))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **changes: Any
    ) -> Completion:
        """Return the answer to one conversation."""
        chosen = msgspec.structs.replace(params or SamplingParams(), **changes)
        return self._run(self._engine.chat(messages, chosen))

    def close(self) -> None:
        """End the engine."""
        if self._open:
            self._open = False
            self._run(self._engine.__aexit__(None, None, None))
            self._stop()

    def __enter__(self) -> Self:
        """Return itself, loaded."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the engine."""
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _completion(chunks: Sequence[Chunk], prompt_tokens: int) -> Completion:
    last = chunks[-1]
    return Completion(
        text="".join(c.text for c in chunks),
        token_ids=tuple(t for c in chunks for t in c.token_ids),
        finish=last.finish or FinishReason.CANCELLED,
        prompt_tokens=prompt_tokens,
        cached_tokens=last.cached_tokens,
        score=last.score,
    )


async def _gather(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*work))
