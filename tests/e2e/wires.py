"""What one tenant sends a server over HTTP, and every byte of what it is told."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import httpx

Json = dict[str, Any]

_IDS: Final = re.compile(rb'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"|"created":[0-9]+')
_FRESH: Final = {"date", "x-request-id", "x-kvkeep-request-id"}
"""Headers that differ between any two answers."""
NEVER: Final = {"X-Kvkeep-Store": "never"}
CAP: Final = 2
"""Requests at a time of each tenant."""

Told = tuple[object, ...]


def _plain(ids: list[int]) -> Json:
    return {
        "prompt": ids,
        "max_tokens": 6,
        "temperature": 0.9,
        "seed": 7,
        "logprobs": 2,
        "ignore_eos": True,
    }


def _stream(ids: list[int]) -> Json:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return {**_plain(ids), "stream": True, "stream_options": usage}


def _batch(ids: list[int]) -> Json:
    """Four prompts that begin alike, told as they are answered: in which order?"""
    other = [5, *ids[1:]]
    prompts = [other[:520], ids[:300], ids, other[:130]]
    return {**_stream(ids), "prompt": prompts, "max_tokens": 1}


BODIES: Final[Mapping[str, Callable[[list[int]], Json]]] = {
    "plain": _plain,
    "stream": _stream,
    "batch": _batch,
    "echo": lambda ids: {**_plain(ids[:330]), "echo": True, "max_tokens": 2},
    "two": lambda ids: {**_stream(ids), "n": 2, "max_tokens": 80},
    "best": lambda ids: {**_plain(ids), "n": 1, "best_of": 3},
    "beams": lambda ids: {**_plain(ids), "n": 2, "use_beam_search": True},
    "stop": lambda ids: {**_stream(ids), "stop": ["a", "e", "t", " "], "max_tokens": 40},
    "no tokens": lambda ids: {**_plain(ids), "echo": True, "max_tokens": 0},
    "too long": lambda ids: _plain((ids * 40)[:20_000]),
    "bad": lambda ids: {**_plain(ids), "max_tokens": "many"},
    "unknown": lambda ids: {**_plain(ids), "model": "another"},
    "never": _plain,
    "salted": _plain,
    "forged": _plain,
}
"""Ways to ask of `/v1/completions`."""

HEADERS: Final[Mapping[str, Mapping[str, str]]] = {
    "never": NEVER,
    "salted": {"X-Cache-Salt": "mine"},
    "forged": {"X-Kvkeep-Tenant": "v0"},
}


class Wire:
    """One tenant's way to a server; `subject` is whom a gateway's key speaks for."""

    def __init__(self, url: str, key: str, subject: str | None = None) -> None:
        self._key = key
        headers = {"Authorization": f"Bearer {key}"}
        if subject is not None:
            headers["X-Kvkeep-Subject"] = subject
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=60)

    async def ask(self, how: str, ids: Sequence[int]) -> Told:
        """Send one request; return status, headers and body but for what is new in each."""
        body = {"model": "tiny", **BODIES[how](list(ids))}
        reply = await self._http.post("/v1/completions", json=body, headers=HEADERS.get(how))
        return _told(reply)

    async def chat(self, text: str) -> Told:
        """Ask for a conversation's next turn."""
        message = {"role": "user", "content": text}
        body = {"model": "tiny", "messages": [message], "max_tokens": 5, "temperature": 0.0}
        reply = await self._http.post("/v1/chat/completions", json=body)
        return _told(reply)

    async def leave(self, ids: Sequence[int]) -> Told:
        """Begin to read a stream and hang up; of what was computed nothing may stay."""
        body = {"model": "tiny", **_stream(list(ids)), "max_tokens": 300}
        async with self._http.stream("POST", "/v1/completions", json=body, headers=NEVER) as reply:
            return (reply.status_code,)

    async def crowd(self, ids: Sequence[int]) -> Told:
        """Take all places, ask once more, and give them back."""
        places = [await self._place() for _ in range(CAP)]
        try:
            return await self.ask("plain", ids)
        finally:
            for writer in places:
                writer.close()
                await writer.wait_closed()

    async def close(self) -> None:
        """Hang up."""
        await self._http.aclose()

    async def _place(self) -> asyncio.StreamWriter:
        """Announce a request whose body never comes, and wait until its place is taken."""
        url = self._http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer"
            f" {self._key}\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        )
        writer.write(head.encode())
        line = await reader.readline()
        assert line.startswith(b"HTTP/1.1 100"), line
        return writer


def _told(reply: httpx.Response) -> Told:
    headers = tuple((k, v) for k, v in reply.headers.items() if k not in _FRESH)
    return (reply.status_code, headers, _IDS.sub(b"", reply.content))
