"""The public port's OpenAPI document, made from the same records that requests are decoded into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from kvkeep.server.problems import ErrorBody
from kvkeep.server.replies import (
    ChatReply,
    CompletionReply,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
)
from kvkeep.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_JSON = "application/json"
_PROBLEMS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504")


@dataclass(frozen=True, slots=True)
class _Operation:
    path: str
    method: str
    summary: str
    reply: type[msgspec.Struct] | None
    body: type[msgspec.Struct] | None = None
    streams: bool = False


_OPERATIONS = (
    _Operation("/health", "get", "Whether the server answers", Health),
    _Operation("/openapi.json", "get", "This document", None),
    _Operation("/v1/models", "get", "The models served", ModelList),
    _Operation("/v1/models/{model}", "get", "One model", ModelCard),
    _Operation(
        "/v1/chat/completions", "post", "Answer a chat", ChatReply, ChatRequest, streams=True
    ),
    _Operation(
        "/v1/completions",
        "post",
        "Complete a prompt",
        CompletionReply,
        CompletionRequest,
        streams=True,
    ),
    _Operation("/tokenize", "post", "Token ids of a prompt or chat", Tokens, TokenizeRequest),
    _Operation("/detokenize", "post", "Text of token ids", Text, DetokenizeRequest),
)


@cache
def document() -> bytes:
    """Return the document as JSON."""
    types = {t for op in _OPERATIONS for t in (op.reply, op.body, ErrorBody) if t is not None}
    ordered = sorted(types, key=lambda t: t.__name__)
    refs, components = msgspec.json.schema_components(
        ordered, ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(ordered, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, schemas)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "kvkeep", "version": "1"},
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{"key": []}],
        }
    )


def _describe(
    operation: _Operation, schemas: dict[type[msgspec.Struct], dict[str, Any]]
) -> dict[str, Any]:
    content: dict[str, Any] = {
        _JSON: {"schema": schemas[operation.reply] if operation.reply else {"type": "object"}}
    }
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    problem = {"description": "An error", "content": {_JSON: {"schema": schemas[ErrorBody]}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer", "content": content}}
        | dict.fromkeys(_PROBLEMS, problem),
    }
    if operation.path == "/health":
        described["security"] = []
        described["responses"]["503"] = described["responses"]["200"]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {_JSON: {"schema": schemas[operation.body]}},
        }
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described
