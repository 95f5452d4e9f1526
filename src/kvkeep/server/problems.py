"""How an error is told to a client: OpenAI's shape, a status, never a value the client sent."""

from __future__ import annotations

from typing import ClassVar

import msgspec
from starlette.exceptions import HTTPException

from kvkeep.errors import (
    CapacityError,
    DeadlineExceeded,
    EngineStopped,
    RequestCancelled,
    RequestError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

CLIENT_GONE = 499
"""What the log says of a request whose client went away; never sent."""


class NotFound(RequestError):
    """No such path or model."""

    status: ClassVar[int] = 404
    code: ClassVar[str] = "not_found"


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    status: ClassVar[int] = 408
    code: ClassVar[str] = "request_timeout"


class MalformedHttp(RequestError):
    """What came is not an HTTP request."""

    code: ClassVar[str] = "malformed_http"


class UnsupportedMediaType(RequestError):
    """The body is not JSON by its own content type."""

    status: ClassVar[int] = 415
    code: ClassVar[str] = "unsupported_media_type"


class Unavailable(RequestError):
    """The server is starting, draining, or its engine has died."""

    status: ClassVar[int] = 503
    code: ClassVar[str] = "service_unavailable"


class GenerationFailed(RequestError):
    """The engine ended a sequence with an error; the words are its own, without content."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "engine_error"


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inside of OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    error: ErrorDetail


class Problem(msgspec.Struct, frozen=True):
    """An answer that is an error."""

    status: int
    body: ErrorBody

    def json(self) -> bytes:
        """Return the body as JSON."""
        return msgspec.json.encode(self.body)


_HTTP = {
    404: "no such path; see /openapi.json",
    405: "this path does not take this method; see /openapi.json",
    413: "the body is larger than this server takes",
}


def problem_of(error: BaseException) -> Problem:
    """Return what to answer; an error nobody foresaw is a 500 that says nothing of itself."""
    if isinstance(error, RequestError):
        return _problem(error.status, _sentence(error), error.code, error.param)
    if isinstance(error, CapacityError):
        return _problem(
            429,
            "this tenant's share of the cache is used up; send less or later",
            "rate_limit_exceeded",
        )
    if isinstance(error, DeadlineExceeded):
        return _problem(504, "the request did not end before its deadline", "deadline_exceeded")
    if isinstance(error, RequestCancelled):
        return _problem(503, "the request was cancelled by the server", "cancelled")
    if isinstance(error, EngineStopped):
        return _problem(503, "the engine has stopped; try again later", "service_unavailable")
    if isinstance(error, HTTPException):
        known = _HTTP.get(error.status_code, "the request can't be served")
        return _problem(
            error.status_code, known, _TYPES.get(error.status_code, "invalid_request_error")
        )
    return _problem(
        500, "internal error; the operator's log has the request's id", "internal_error"
    )


def _sentence(error: RequestError) -> str:
    text = str(error)
    return text if error.param is None or text.startswith(error.param) else f"{error.param}: {text}"


def _problem(status: int, message: str, code: str, param: str | None = None) -> Problem:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return Problem(status, ErrorBody(ErrorDetail(message, kind, param, code)))
