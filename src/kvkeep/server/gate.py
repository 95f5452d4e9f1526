"""What every request passes: ids, identity, errors in one shape, one log line."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvkeep.errors import EngineStopped, Forbidden, Unauthenticated
from kvkeep.metrics import AUTH_FAILURES, DISCONNECTS, HTTP_REQUESTS
from kvkeep.server.frontend import Frontend
from kvkeep.server.identity import Identity
from kvkeep.server.logs import RequestRecord, log_failure, log_request
from kvkeep.server.problems import CLIENT_GONE, ClientGone, Problem, problem_of

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")

Authorize = Callable[[Headers, str], Identity | None]


@dataclass(slots=True)
class Call:
    """One request on its way through the server."""

    record: RequestRecord
    identity: Identity | None = None


def call_of(scope: Scope) -> Call:
    """Return the request's call, put there by the gate."""
    call = scope["kvkeep.call"]
    assert isinstance(call, Call)
    return call


class Gate:
    """ASGI middleware around all routes of a port; paths in `open_paths` need no key."""

    def __init__(
        self,
        app: ASGIApp,
        frontend: Frontend,
        authorize: Authorize,
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._frontend = frontend
        self._authorize = authorize
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass HTTP on through the gate; refuse what is neither HTTP nor a lifespan."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord(secrets.token_hex(16), method=_method(scope["method"]))
        headers = Headers(scope=scope)
        outer = _Sender(send, record, _answer_headers(headers, record.id))
        scope["kvkeep.call"] = call = Call(record)
        try:
            if scope["path"] not in self._open_paths:
                call.identity = self._authorize(headers, connection_of(scope))
                if call.identity is not None:
                    record.tenant, record.key = call.identity.account, call.identity.key_id
            await self._app(scope, receive, outer)
        except (ClientGone, OSError):
            record.status = CLIENT_GONE
            self._frontend.count(DISCONNECTS)
        except asyncio.CancelledError:
            record.status = record.status or 503
            raise
        except Exception as error:  # noqa: BLE001 - the last place where it can be told
            await self._refuse(error, record, outer)
        finally:
            self._frontend.count(HTTP_REQUESTS, record.route, str(record.status))
            log_request(record)

    async def _refuse(self, error: Exception, record: RequestRecord, send: _Sender) -> None:
        problem = problem_of(error)
        if isinstance(error, Unauthenticated | Forbidden):
            self._frontend.count(AUTH_FAILURES)
        if isinstance(error, EngineStopped):
            self._frontend.engine_died()
        if problem.body.error.code == "internal_error":
            log_failure(record, error)
        record.error = problem.body.error.code
        if not record.status:
            await send.problem(problem, self._frontend.options.retry_after_s)


class _Sender:
    """Adds the request's ids to the answer and notes its status."""

    def __init__(
        self, send: Send, record: RequestRecord, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self._send = send
        self._record = record
        self._headers = headers

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        await self._send(message)

    async def problem(self, problem: Problem, retry_after_s: int) -> None:
        """Send an error as the whole answer."""
        await send_json(
            self, problem.json(), problem.status, problem_headers(problem, retry_after_s)
        )


def problem_headers(problem: Problem, retry_after_s: int) -> list[tuple[bytes, bytes]]:
    """Return the headers an error needs beside its body."""
    if problem.status in (429, 503):
        return [(b"retry-after", str(retry_after_s).encode())]
    return [(b"www-authenticate", b"Bearer")] if problem.status == 401 else []


async def send_json(
    send: Send, body: bytes, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Send a JSON body as the whole answer."""
    base = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": status, "headers": [*base, *(headers or [])]}
    )
    await send({"type": "http.response.body", "body": body})


def connection_of(scope: Scope) -> str:
    """Return what tells connections apart: the listener's own number, else the peer's address."""
    number = scope.get("state", {}).get("connection")
    client = scope.get("client")
    address = f"{client[0]} {client[1]}" if client else "unknown"
    return address if number is None else f"{number} {address}"


def _answer_headers(headers: Headers, request_id: str) -> list[tuple[bytes, bytes]]:
    asked = headers.get("x-request-id", "")
    shown = asked if _REQUEST_ID.fullmatch(asked) else request_id
    return [(b"x-request-id", shown.encode()), (b"x-kvkeep-request-id", request_id.encode())]


def _method(method: str) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return method if method in known else "other"
