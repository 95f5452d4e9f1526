"""The admin port: metrics, readiness with details and reload, behind a token of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from kvkeep.engine.api import EngineStats, ModelInfo
from kvkeep.errors import ConfigError, EngineError, Unauthenticated
from kvkeep.server.app import http_problem, plain, reply
from kvkeep.server.cluster import Workers, worker_routes
from kvkeep.server.frontend import Frontend, Health
from kvkeep.server.gate import Gate
from kvkeep.server.keys import same_secret
from kvkeep.server.metrics_page import render, spelled


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server stands, for its operator."""

    status: str
    in_flight: int
    accounts: int
    model: ModelInfo | None
    engine: EngineStats | None


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a reload."""

    reloaded: bool
    message: str


def create_admin_app(front: Frontend, token: str, workers: Workers | None = None) -> Starlette:
    """Return the admin app over the public app's `state.frontend`; all of it needs the token.

    `workers` are a cluster's.
    """
    if not token:
        raise ConfigError("admin token: must not be empty")

    def authorize(headers: Headers, _connection: str) -> None:
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not same_secret(presented.strip(), token):
            raise Unauthenticated(
                "send the admin token as `Authorization: Bearer ...`", param="Authorization"
            )

    app = Starlette(
        routes=[
            plain("/metrics", "GET", partial(_metrics, front)),
            plain("/ready", "GET", partial(_ready, front)),
            plain("/reload", "POST", partial(_reload, front)),
            plain("/purge", "POST", partial(_purge, front)),
            plain("/shred", "POST", partial(_shred, front)),
            *([] if workers is None else worker_routes(workers)),
        ],
        middleware=[Middleware(Gate, front, authorize)],
        exception_handlers={HTTPException: http_problem},
    )
    app.router.redirect_slashes = False
    return app


async def _metrics(front: Frontend, _request: Request) -> Response:
    stats = await _stats(front)
    return Response(render(front, stats), media_type=CONTENT_TYPE_LATEST)


async def _ready(front: Frontend, _request: Request) -> Response:
    stats = await _stats(front)
    body = Readiness(
        status=front.health.value,
        in_flight=len(front.running),
        accounts=len(front.tenants.quotas()),
        model=front.model,
        engine=stats,
    )
    content = msgspec.json.encode(_without_infinity(msgspec.to_builtins(body)))
    status = 200 if front.health is Health.OK else 503
    return Response(content, status, media_type="application/json")


def _without_infinity(value: Any) -> Any:
    """Return plain data with what JSON has no number for spelled out; it would become null."""
    if isinstance(value, float):
        return spelled(value)
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(inner) for inner in value]
    return value


async def _reload(front: Frontend, _request: Request) -> Response:
    try:
        await front.reload()
    except ConfigError as error:
        return reply(Reloaded(reloaded=False, message=str(error)), 409)
    return reply(Reloaded(reloaded=True, message=f"{len(front.tenants.quotas())} accounts"))


async def _purge(front: Frontend, request: Request) -> Response:
    return reply(await front.purge(request.query_params.get("tenant", "")))


async def _shred(front: Frontend, request: Request) -> Response:
    return reply(await front.shred(request.query_params.get("tenant", "")))


async def _stats(front: Frontend) -> EngineStats | None:
    """Return the engine's figures; None while it is starting or when it has died."""
    if front.model is None:
        return None
    try:
        return await front.client.stats()
    except EngineError:
        front.engine_died()
        return None
