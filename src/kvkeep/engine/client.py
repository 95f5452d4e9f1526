"""The asyncio side of an engine loop, whatever carries its messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

from kvkeep import errors
from kvkeep.engine import messages as m
from kvkeep.engine.api import (
    Chunk,
    ChunkStream,
    EngineStats,
    GenerateRequest,
    ModelInfo,
    Purged,
    TenantTerms,
    TokenLogprob,
)
from kvkeep.engine.guarded import Said
from kvkeep.errors import ConfigError, EngineError, EngineStopped

Progress = Callable[[int, int], None]
Arrivals = asyncio.Queue[Chunk | EngineError]
Verdict = asyncio.Future[tuple[Said, ...]]


class Transport(Protocol):
    """Carries commands to a loop; replies come back through the callback given to `start`."""

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        """Begin; `deliver` may be called from any thread."""

    def send(self, command: m.Command) -> None:
        """Hand a command over without blocking for long."""

    def join(self, timeout_s: float) -> None:
        """Wait for the loop to end, then make it end."""


class _Stream:
    """One request's chunks as they come; `aclose` before the end cancels the request."""

    def __init__(
        self, request: GenerateRequest, arrivals: Arrivals, ended: Callable[..., None]
    ) -> None:
        self._request = request
        self._arrivals = arrivals
        self._ended = ended
        self._left = request.params.n
        self._open = True

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Chunk:
        """Return the next chunk; raises `EngineError` where the engine ended."""
        if not self._open:
            raise StopAsyncIteration
        item = await self._arrivals.get()
        if isinstance(item, EngineError):
            self._close(finished=True)
            raise item
        self._left = 0 if item.error is not None else self._left - (item.finish is not None)
        if not self._left:
            self._close(finished=True)
        return item

    async def aclose(self) -> None:
        """Stop reading; a request that is not finished is cancelled within a step."""
        if self._open:
            self._close(finished=False)

    def _close(self, *, finished: bool) -> None:
        self._open = False
        self._ended(self._request, finished=finished)


class MessageClient:
    """`EngineClient` over a transport; create it inside a running event loop."""

    def __init__(self, transport: Transport, progress: Progress | None = None) -> None:
        self._transport = transport
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, Arrivals] = {}
        self._ready: asyncio.Future[ModelInfo] = self._loop.create_future()
        self._stats: deque[asyncio.Future[EngineStats]] = deque()
        self._tenants: deque[asyncio.Future[None]] = deque()
        self._purges: deque[asyncio.Future[Purged]] = deque()
        self._votes: deque[asyncio.Future[m.Votes]] = deque()
        self._published: deque[asyncio.Future[None]] = deque()
        self._verdicts: dict[str, Verdict] = {}
        self._failure: Exception | None = None
        self._drained = asyncio.Event()
        """No stream is open."""
        self._drained.set()
        self._closing = False
        transport.start(self._deliver)

    def submit(self, request: GenerateRequest) -> ChunkStream:
        """Start a request; closing the iterator cancels it within a step."""
        self._raise_if_down()
        if request.id in self._streams:
            raise EngineError("a request with this id is already running")
        stream: Arrivals = asyncio.Queue()
        self._streams[request.id] = stream
        self._drained.clear()
        if request.guarded is not None and request.guarded.sampled:
            self._verdicts[request.id] = self._loop.create_future()
        self._transport.send(m.Submit(request))
        return _Stream(request, stream, self._ended)

    def begin(
        self,
        request_id: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        *,
        counted: bool = False,
    ) -> None:
        """Let a request go on after another engine's tokens; see `messages.Begin`."""
        if self._failure is None and request_id in self._streams:
            self._transport.send(m.Begin(request_id, token_ids, logprobs, counted))

    def verdict(self, request_id: str) -> Verdict:
        """Return what the shadow of a sampled request will have said.

        Nothing is said where the request fails, or the engine ends before.
        """
        return self._verdicts[request_id]

    async def info(self) -> ModelInfo:
        """Return the model's description, once loaded and warm."""
        return await asyncio.shield(self._ready)

    async def stats(self) -> EngineStats:
        """Return counters and gauges."""
        self._raise_if_down()
        future: asyncio.Future[EngineStats] = self._loop.create_future()
        self._stats.append(future)
        self._transport.send(m.GetStats())
        return await future

    async def set_tenants(
        self, quotas: dict[str, float], terms: dict[str, TenantTerms] | None = None
    ) -> None:
        """Set share and terms of each tenant; raises `ConfigError` where they do not fit."""
        self._raise_if_down()
        future: asyncio.Future[None] = self._loop.create_future()
        self._tenants.append(future)
        self._transport.send(m.SetTenants(quotas, terms or {}))
        await future

    async def purge(self, tenant: str) -> Purged:
        """Drop a tenant's cached pages and votes."""
        self._raise_if_down()
        future: asyncio.Future[Purged] = self._loop.create_future()
        self._purges.append(future)
        self._transport.send(m.Purge(tenant))
        return await future

    async def close_epoch(self, epoch: int, now: float) -> m.Votes:
        """Let the sharing policy's next epoch begin; return the votes to be counted."""
        self._raise_if_down()
        future: asyncio.Future[m.Votes] = self._loop.create_future()
        self._votes.append(future)
        self._transport.send(m.CloseEpoch(epoch, now))
        return await future

    async def publish(self, state: bytes, now: float) -> None:
        """Make public what came of all engines' votes."""
        self._raise_if_down()
        future: asyncio.Future[None] = self._loop.create_future()
        self._published.append(future)
        self._transport.send(m.Publish(state, now))
        await future

    def abandon(self, why: str) -> None:
        """Take the engine for dead: everything that waits for it ends now, and so shall it."""
        self._transport.send(m.Stop())
        self._fail(EngineStopped(why))

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Stop taking requests, wait up to `drain_s` for those running, and end the loop."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._drained.wait()
        if self._failure is None:
            self._transport.send(m.Stop())
        await asyncio.to_thread(self._transport.join, 10.0)
        self._fail(EngineStopped("the engine was stopped"))

    def _ended(self, request: GenerateRequest, *, finished: bool) -> None:
        """Forget a stream; one that its reader left early is cancelled."""
        self._streams.pop(request.id, None)
        if not self._streams:
            self._drained.set()
        if not finished and self._failure is None:
            self._transport.send(m.Cancel(request.id))

    def _deliver(self, reply: m.Reply) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is gone: nobody is left to tell
            self._loop.call_soon_threadsafe(self._on_reply, reply)

    def _on_reply(self, reply: m.Reply) -> None:
        match reply:
            case m.Outputs(items):
                for request_id, chunk in items:
                    if chunk.error is not None:
                        self._judge(request_id, ())
                    stream = self._streams.get(request_id)
                    if stream is not None:
                        stream.put_nowait(chunk)
            case m.Stats(stats):
                _resolve(self._stats.popleft(), stats)
            case m.TenantsSet(error):
                future = self._tenants.popleft()
                if error is None:
                    _resolve(future, None)
                elif not future.done():
                    future.set_exception(ConfigError(error))
            case m.PurgeDone(purged):
                _resolve(self._purges.popleft(), purged)
            case m.Votes():
                _resolve(self._votes.popleft(), reply)
            case m.Published():
                _resolve(self._published.popleft(), None)
            case m.Verdict(request_id, said):
                self._judge(request_id, said)
            case m.Loading(done, total):
                if self._progress is not None:
                    self._progress(done, total)
            case m.Ready(info):
                _resolve(self._ready, info)
            case m.Failed(kind, message):
                self._fail(_error(kind, message))
            case m.Stopped():
                self._fail(EngineStopped("the engine was stopped"))

    def _judge(self, request_id: str, said: tuple[Said, ...]) -> None:
        """Tell what a sampled request has said, once; whoever has left has let go of it."""
        future = self._verdicts.pop(request_id, None)
        if future is not None:
            _resolve(future, said)

    def _fail(self, error: Exception) -> None:
        """End everything that waits; later calls raise `EngineStopped`."""
        if self._failure is not None:
            return
        self._failure = error
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # retrieved here; `info()` raises it again to whoever asks
        down = error if isinstance(error, EngineError) else EngineStopped(str(error))
        for stream in self._streams.values():
            stream.put_nowait(down)
        for request_id in list(self._verdicts):
            self._judge(request_id, ())
        waiting: list[asyncio.Future[Any]] = [
            *self._stats,
            *self._tenants,
            *self._purges,
            *self._votes,
            *self._published,
        ]
        for future in waiting:
            if not future.done():
                future.set_exception(down)

    def _raise_if_down(self) -> None:
        if self._failure is not None:
            raise EngineStopped(f"the engine is not running: {self._failure}")
        if self._closing:
            raise EngineStopped("the engine is shutting down")


T = TypeVar("T")


def _resolve(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _error(kind: str, message: str) -> Exception:
    """Return the kvkeep error of that name (an `EngineError` for any other)."""
    found = getattr(errors, kind, EngineError)
    if isinstance(found, type) and issubclass(found, errors.KvkeepError):
        return found(message)
    return EngineError(message)
