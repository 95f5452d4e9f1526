"""Reads a request's body with a cap and parses it strictly: one reading of the bytes, or a 400."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.requests import ClientDisconnect, Request

from kvkeep.errors import InvalidRequest, PayloadTooLarge
from kvkeep.server.options import ServerLimits
from kvkeep.server.problems import BodyTimeout, ClientGone, UnsupportedMediaType

_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_INT_DIGITS = 20

JsonObject = dict[str, Any]


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """Return the body; raises 415, 413 (keeping no more than the cap) and 408 where it is late."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("send the body as application/json", param="Content-Type")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:16]) > limits.max_body_bytes:
        raise _too_large(limits)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.max_body_wait_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body_bytes:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError:
        raise BodyTimeout(
            f"the body did not arrive within {limits.max_body_wait_s:g} s", param="body"
        ) from None
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(parts)


def parse_object(raw: bytes, limits: ServerLimits) -> JsonObject:
    """Return the JSON object in `raw`; refuses all that two parsers might read differently."""
    _check_depth(raw, limits.max_json_depth)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("must be UTF-8", param="body") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_small_int
        )
    except InvalidRequest:
        raise
    except (ValueError, RecursionError):
        raise InvalidRequest("must be valid JSON", param="body") from None
    if not isinstance(value, dict):
        raise InvalidRequest("must be a JSON object", param="body")
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value)
    return value


def printable(name: str) -> str:
    """Return a field name a client chose, short and in plain ASCII."""
    return name.encode("ascii", "backslashreplace").decode()[:64]


def _too_large(limits: ServerLimits) -> PayloadTooLarge:
    return PayloadTooLarge(f"must be at most {limits.max_body_bytes} bytes", param="body")


def _check_depth(raw: bytes, limit: int) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(raw):
        first = raw[match.start()]
        if first in b"[{":
            depth += 1
            if depth > limit:
                raise InvalidRequest(f"must not be nested deeper than {limit} levels", param="body")
        elif first in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise InvalidRequest("must not name a field twice in one object", param="body")
    return result


def _no_constant(_name: str) -> None:
    raise InvalidRequest("must not contain NaN or Infinity", param="body")


def _small_int(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        raise InvalidRequest(
            f"must not contain an integer of more than {_MAX_INT_DIGITS} digits", param="body"
        )
    return int(digits)


def _check_surrogates(value: JsonObject) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("must not contain half of a surrogate pair", param="body") from None
