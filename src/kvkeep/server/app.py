"""The public port: POST /v1/chat/completions -> identity, schema, `EngineClient.submit()`.

Tokens go back as they come.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvkeep.config import CONSENT_PATH
from kvkeep.engine.api import EngineClient, ModelInfo
from kvkeep.server import frontend as state
from kvkeep.server.body import read_body
from kvkeep.server.exchange import GenerateRoute, context_of, known
from kvkeep.server.frontend import Frontend
from kvkeep.server.gate import Gate, call_of
from kvkeep.server.openapi import document
from kvkeep.server.options import ServerOptions
from kvkeep.server.prepare import (
    Context,
    prepare_chat,
    prepare_completion,
    prepare_detokenize,
    prepare_tokenize,
)
from kvkeep.server.problems import NotFound, problem_of
from kvkeep.server.replies import Health, ModelCard, ModelList
from kvkeep.server.store import TenantStore
from kvkeep.server.text import TextModel

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    client: EngineClient, text: TextModel, tenants: TenantStore, options: ServerOptions
) -> Starlette:
    """Return the public app; its `state.frontend` is what the admin app is made of."""
    front = Frontend(client, text, tenants, options)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with front.alive():
            yield

    app = Starlette(
        routes=_routes(front),
        middleware=[Middleware(Gate, front, front.identify, _open_paths(options))],
        exception_handlers={HTTPException: http_problem},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.frontend = front
    return app


def plain(route: str, method: str, endpoint: Endpoint) -> Route:
    """Return a route whose log line and metrics carry its own name."""

    async def named(request: Request) -> Response:
        call_of(request.scope).record.route = route
        return await endpoint(request)

    return Route(route, named, methods=[method])


def reply(body: msgspec.Struct, status: int = 200) -> Response:
    """Return a JSON answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def http_problem(_request: Request, error: Exception) -> Response:
    """Return a routing error (404, 405) in OpenAI's shape."""
    problem = problem_of(error)
    headers = error.headers if isinstance(error, HTTPException) else None
    return Response(problem.json(), problem.status, headers, "application/json")


def _open_paths(options: ServerOptions) -> frozenset[str]:
    """Return what is answered without a key."""
    return frozenset({"/health"} if options.audit_consent is None else {"/health", CONSENT_PATH})


def _routes(front: Frontend) -> list[Route]:
    chat, completions = "/v1/chat/completions", "/v1/completions"
    consent = front.options.audit_consent
    return [
        *([] if consent is None else [plain(CONSENT_PATH, "GET", partial(_consent, consent))]),
        plain("/health", "GET", partial(_health, front)),
        plain("/openapi.json", "GET", _openapi),
        plain("/v1/models", "GET", partial(_models, front)),
        plain("/v1/models/{model:path}", "GET", partial(_model, front)),
        plain("/tokenize", "POST", partial(_text, front, prepare_tokenize)),
        plain("/detokenize", "POST", partial(_text, front, prepare_detokenize)),
        Route(chat, GenerateRoute(front, chat, prepare_chat), methods=["POST"]),
        Route(completions, GenerateRoute(front, completions, prepare_completion), methods=["POST"]),
    ]


async def _health(front: Frontend, _request: Request) -> Response:
    """Tell whether requests can be served; nothing of the load."""
    health = front.health
    return reply(Health(status=health.value), 200 if health is state.Health.OK else 503)


async def _consent(token: str, _request: Request) -> Response:
    return Response(f"{token}\n", media_type="text/plain")


async def _openapi(_request: Request) -> Response:
    return Response(document(), media_type="application/json")


async def _models(front: Frontend, _request: Request) -> Response:
    info = front.ready()
    return reply(ModelList(data=[_card(name, info) for name in front.names(info)]))


async def _model(front: Frontend, request: Request) -> Response:
    info = front.ready()
    name = request.path_params["model"]
    if name not in front.names(info):
        raise NotFound("this server has no such model; see /v1/models", param="model")
    return reply(_card(name, info))


async def _text(
    front: Frontend, prepare: Callable[[Context, bytes], msgspec.Struct], request: Request
) -> Response:
    """Answer a tokenizer's request; it holds one of the account's places like any other."""
    call = call_of(request.scope)
    identity = known(call.identity)
    front.ready()
    with front.running.admit(call.record.id, identity) as job:
        raw = await read_body(request, front.options.limits)
        context = context_of(front, call.record.id, identity)
        body = await front.workers.run(identity.account, partial(prepare, context, raw))
        job.check()
        return reply(body)


def _card(name: str, info: ModelInfo) -> ModelCard:
    return ModelCard(id=name, max_model_len=info.max_model_len)
