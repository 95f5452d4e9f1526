"""Talk to the admin port of a running server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from kvkeep.config import Settings
from kvkeep.errors import ConfigError, EngineError

_TIMEOUT_S = 30.0


def post_admin(settings: Settings, path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """Return the answer to a POST; raises `ConfigError` or `EngineError` in one sentence."""
    if settings.admin_token_file is None:
        raise ConfigError("admin_token_file: is needed; give the file the server was started with")
    try:
        token = settings.admin_token_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"admin_token_file: can't be read: {error.strerror}") from None
    socket = None if settings.admin_socket is None else str(settings.admin_socket)
    host = f"[{settings.admin_host}]" if ":" in settings.admin_host else settings.admin_host
    url = "http://admin" if socket else f"http://{host}:{settings.admin_port}"
    headers = {"Authorization": f"Bearer {token}"}
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket), timeout=_TIMEOUT_S) as client:
            answer = client.post(url + path, params=dict(query), headers=headers)
    except httpx.HTTPError:
        raise EngineError(f"no server answers at {socket or url}; is it running?") from None
    if answer.is_error:
        raise EngineError(f"the server refused: {answer.json()['error']['message']}")
    return dict(answer.json())
