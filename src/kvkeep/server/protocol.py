"""A connection's HTTP protocol: numbered, and with OpenAI's error shape for what is not HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from kvkeep.server.problems import MalformedHttp, problem_of


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Either of uvicorn's protocols."""

    def send_400_response(self, _msg: str) -> None:
        """Answer what can't be parsed and hang up; in the middle of an answer only hang up."""
        cycle = self.cycle
        if cycle is None or not cycle.response_started or cycle.response_complete:
            self.transport.write(_refusal())
        self.transport.close()


def numbered() -> Callable[..., asyncio.Protocol]:
    """Return a factory of protocols; each connection's number tells it from all others."""
    connections = itertools.count()

    def protocol(
        config: uvicorn.Config,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        """Return a connection's protocol; another may have its address after it."""
        made: asyncio.Protocol = Protocol(
            config=config,
            server_state=server_state,
            app_state={**app_state, "connection": next(connections)},
            _loop=_loop,
        )
        return made

    return protocol


def _refusal() -> bytes:
    problem = problem_of(MalformedHttp("the request is not valid HTTP/1.1"))
    body = problem.json()
    head = (
        "HTTP/1.1 400 Bad Request\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body
