"""The admin port's part about a cluster's workers: restart and scale them."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvkeep.errors import ConfigError, InvalidRequest, KvkeepError
from kvkeep.server.app import plain, reply


class Workers(Protocol):
    """Who leads a cluster's workers."""

    async def restart(self, name: str) -> None:
        """Drain a worker, end it and start it again."""

    async def restart_all(self) -> None:
        """Restart the workers one after the other."""

    async def scale(self, role: Literal["prefill", "decode"], count: int) -> None:
        """Have so many workers of a role."""


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a change."""

    changed: bool
    message: str


def worker_routes(workers: Workers) -> list[Route]:
    """Return the routes; each answers once the change is through."""
    return [
        plain("/workers/restart", "POST", partial(_restart, workers)),
        plain("/workers/scale", "POST", partial(_scale, workers)),
    ]


async def _restart(workers: Workers, request: Request) -> Response:
    name = request.query_params.get("name")
    if name is None:
        return await _outcome(workers.restart_all(), "all workers were restarted")
    return await _outcome(workers.restart(name), f"{name} was restarted")


async def _scale(workers: Workers, request: Request) -> Response:
    role, count = request.query_params.get("role"), request.query_params.get("count", "")
    if role not in {"prefill", "decode"}:
        raise InvalidRequest("role: must be prefill or decode", param="role")
    if not (count.isascii() and count.isdigit() and len(count) < 4):
        raise InvalidRequest("count: must be a whole number below 1000", param="count")
    known: Literal["prefill", "decode"] = "prefill" if role == "prefill" else "decode"
    return await _outcome(workers.scale(known, int(count)), f"{int(count)} {role} workers")


async def _outcome(change: Awaitable[None], done: str) -> Response:
    try:
        await change
    except ConfigError as error:
        return reply(Changed(changed=False, message=str(error)), 409)
    except KvkeepError as error:
        return reply(Changed(changed=False, message=str(error)), 503)
    return reply(Changed(changed=True, message=done))
