"""One generation request from its body to its last byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from kvkeep.engine.api import ModelInfo
from kvkeep.errors import EngineStopped, Unauthenticated
from kvkeep.metrics import IGNORED_FIELDS
from kvkeep.server.body import read_body
from kvkeep.server.frontend import Frontend
from kvkeep.server.gate import call_of, send_json
from kvkeep.server.generation import Event, Generation, check_finish
from kvkeep.server.identity import Identity
from kvkeep.server.logs import RequestRecord, log_failure
from kvkeep.server.prepare import Context, Prepared
from kvkeep.server.problems import ClientGone, problem_of
from kvkeep.server.running import Job
from kvkeep.server.streaming import DONE, KEEPALIVE, SSE_HEADERS
from kvkeep.types import PAGE_TOKENS

Prepare = Callable[[Context, bytes], Prepared]


class GenerateRoute:
    """An ASGI endpoint that generates; `prepare` tells chats from completions."""

    def __init__(self, frontend: Frontend, route: str, prepare: Prepare) -> None:
        self._frontend = frontend
        self._route = route
        self._prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        front, call = self._frontend, call_of(scope)
        call.record.route = self._route
        identity = known(call.identity)
        front.ready()
        with front.running.admit(call.record.id, identity) as job:
            raw = await read_body(Request(scope, receive), front.options.limits)
            async with _cancelled_by_disconnect(receive, job):
                context = context_of(front, call.record.id, identity)
                prepared = await front.workers.run(
                    identity.account, partial(self._prepare, context, raw)
                )
                job.check()
                _note(front, call.record, prepared)
                async with Generation(front.client, prepared.requests, job) as generation:
                    run = _Run(front, call.record, prepared, generation, job)
                    await (run.stream(send) if prepared.stream else run.answer(send))


class _Run:
    """A prepared request being answered."""

    def __init__(
        self,
        frontend: Frontend,
        record: RequestRecord,
        prepared: Prepared,
        generation: Generation,
        job: Job,
    ) -> None:
        self._frontend = frontend
        self._record = record
        self._prepared = prepared
        self._generation = generation
        self._job = job

    async def answer(self, send: Send) -> None:
        """Send the whole reply once all of it is there."""
        answer, tally = self._prepared.answer, self._prepared.tally
        while (events := await self._generation.next()) is not None:
            for event in events:
                self._count(event)
                answer.add(event)
        body = answer.json(tally)
        await self._release()
        await send_json(send, body)

    async def stream(self, send: Send) -> None:
        """Send what is new as it comes; an error before the first event is an ordinary one."""
        pulse = _Pulse(self._frontend.options.keepalive_s)
        events = await self._generation.next(pulse.left_s())
        data = self._render(events or [])
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        try:
            while events is not None:
                if data or pulse.left_s() == 0:
                    await send(_part(data or KEEPALIVE))
                    pulse.restart()
                events = await self._generation.next(pulse.left_s())
                data = self._render(events or [])
            end = self._prepared.events.end(self._prepared.tally) + DONE
            await self._release()
            await send(_part(end, more=False))
        except (ClientGone, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - the stream has begun: its error is an event
            await self._fail(error, send)

    def _render(self, events: list[Event]) -> bytes:
        parts = []
        for event in events:
            self._count(event)
            parts.append(self._prepared.events.render(event, self._prepared.tally))
        return b"".join(parts)

    def _count(self, event: Event) -> None:
        check_finish(event.chunk)
        tally, record = self._prepared.tally, self._record
        tally.add(event.prompt, event.chunk)
        if event.chunk.token_ids:
            record.first_token()
        record.cached_tokens, record.completion_tokens = (
            tally.cached_tokens,
            tally.completion_tokens,
        )
        record.finish, record.kv = tally.finish, tally.kv

    async def _fail(self, error: Exception, send: Send) -> None:
        """End a stream that has begun with an error event."""
        problem = problem_of(error)
        self._record.error = self._record.finish = problem.body.error.code
        if isinstance(error, EngineStopped):
            self._frontend.engine_died()
        if problem.body.error.code == "internal_error":
            log_failure(self._record, error)
        await self._release()
        await send(_part(b"data: " + problem.json() + b"\n\n", more=False))

    async def _release(self) -> None:
        """Free the tenant's place: only what the client has yet to read is left."""
        await self._generation.aclose()
        self._frontend.running.release(self._job)


class _Pulse:
    """How long a stream may stay silent; chunks that show nothing are no sign of life."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._last = time.monotonic()

    def restart(self) -> None:
        """Note that something was sent."""
        self._last = time.monotonic()

    def left_s(self) -> float:
        """Return the seconds until a comment is due."""
        return max(0.0, self._last + self._silence_s - time.monotonic())


def known(identity: Identity | None) -> Identity:
    """Return the identity the gate found; no route that needs one is open."""
    if identity is None:
        raise Unauthenticated("send a valid API key")
    return identity


def context_of(front: Frontend, request_id: str, identity: Identity) -> Context:
    """Return what a request is prepared with."""
    info = _fitting(front, front.ready(), identity)
    return Context(
        id=request_id,
        identity=identity,
        scope_key=front.tenants.scope_key,
        text=front.text,
        info=info,
        names=front.names(info),
        options=front.options,
    )


def _fitting(front: Frontend, info: ModelInfo, identity: Identity) -> ModelInfo:
    """Return the model's description with the length that fits the account's reserved share."""
    share = front.quotas().get(identity.account, 0.0)
    tokens = int(share * info.num_pages) * PAGE_TOKENS
    return msgspec.structs.replace(info, max_model_len=min(info.max_model_len, tokens))


@asynccontextmanager
async def _cancelled_by_disconnect(receive: Receive, job: Job) -> AsyncIterator[None]:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel(ClientGone())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _note(front: Frontend, record: RequestRecord, prepared: Prepared) -> None:
    record.stream = prepared.stream
    record.prompt_tokens = prepared.tally.prompt_tokens
    record.ignored = prepared.ignored
    for name in prepared.ignored:
        front.count(IGNORED_FIELDS, name)


def _part(body: bytes, *, more: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": more}
