"""A server in virtual time that leaks in exactly the ways it is told to."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvkeep.audit import Account, Cast
from kvkeep.audit.channels.crafted import SENTINELS
from kvkeep.audit.prober import Clock
from kvkeep.audit.prompts import BLANKS

URL = "http://127.0.0.1:8000"
MODEL = "fake"
PAGE = 16
VICTIM = Account("victim", "key-of-victim")
ATTACKER = Account("attacker", "key-of-attacker")
SYBILS = (Account("sybil", "key-of-sybil"),)
CAST = Cast(VICTIM, ATTACKER, SYBILS)
NAMES = {f"Bearer {a.key}": a.name for a in (VICTIM, ATTACKER, *SYBILS)}
SECRET = re.compile(r"\S+@example\.org phone 555 0142 card 4111 1111")


class FakeTime:
    """Time that passes only when something takes it."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def clock(self) -> Clock:
        return Clock(self.now, self.sleep)


@dataclass
class Waiting:
    """A request in the queue."""

    request: httpx.Request
    body: dict[str, Any]
    done: asyncio.Future[httpx.Response]


def text_of(body: Mapping[str, Any]) -> str:
    return str(body["prompt"] if "prompt" in body else body["messages"][0]["content"])


def tokens_of(text: str) -> tuple[str, ...]:
    """Return words; a text without any, and a word that nobody uses, by characters."""
    if text[:1] in BLANKS:
        return tuple(text)
    return tuple(piece for word in text.split() for piece in (word if len(word) > 99 else [word]))


def is_cut(tokens: tuple[str, ...]) -> bool:
    """Tell whether the text holds personal data that no single page holds."""
    pages = (" ".join(tokens[i : i + PAGE]) for i in range(0, len(tokens), PAGE))
    return SECRET.search(" ".join(tokens)) is not None and not any(map(SECRET.search, pages))


@dataclass
class FakeServer:
    """Keeps prefixes by pages of 16 words and scope, served one after the other."""

    leaks: frozenset[str] = frozenset()
    caches: bool = True
    reports: bool = True
    chat_only: bool = False
    own_order: bool = True
    """Whether longer own matches are served first."""
    keys_needed: bool = True
    saved_ms: float = 0.02
    """Per token found."""
    noise_ms: float = 0.3
    capacity_pages: int = 1 << 20
    """Per tenant, or of all where evictions leak."""
    most_at_once: int = 64
    busy: int = 0
    """Requests to be refused with 429 first."""
    uneven: bool = False
    """Whether tokens are counted by what a text begins with, so that twins differ."""
    consent: str | None = None
    time: FakeTime = field(default_factory=FakeTime)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    seen_headers: list[httpx.Headers] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    pages: OrderedDict[tuple[str, tuple[str, ...]], None] = field(default_factory=OrderedDict)
    senders: dict[tuple[str, ...], set[str]] = field(default_factory=dict)
    scopes: set[str] = field(default_factory=set)
    queue: list[Waiting] = field(default_factory=list)
    flushing: asyncio.Task[None] | None = None

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.answer)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/.well-known/kvkeep-audit-consent":
            found = self.consent is not None
            return httpx.Response(200 if found else 404, text=f"{self.consent}\n")
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": MODEL}]})
        if self.chat_only and request.url.path == "/v1/completions":
            return httpx.Response(404, json={"error": {"message": "no such path"}})
        if self.keys_needed and request.headers.get("authorization") not in NAMES:
            return httpx.Response(401, text=str(request.headers.get("authorization")))
        if self.busy:
            self.busy -= 1
            return httpx.Response(429, headers={"retry-after": "2"})
        return await self._enqueue(request)

    async def _enqueue(self, request: httpx.Request) -> httpx.Response:
        if len(self.queue) >= self.most_at_once:
            return httpx.Response(429, headers={"retry-after": "0"})
        future: asyncio.Future[httpx.Response] = asyncio.get_running_loop().create_future()
        self.queue.append(Waiting(request, json.loads(request.content), future))
        if len(self.queue) == 1:
            self.flushing = asyncio.create_task(self._flush())
        return await future

    async def _flush(self) -> None:
        """Serve what was sent at once, which arrives within a few turns of the loop."""
        for _ in range(8):
            await asyncio.sleep(0)
        for waiting in sorted(self.queue, key=self._priority):
            waiting.done.set_result(self._serve(waiting))
        self.queue.clear()

    def _priority(self, waiting: Waiting) -> int:
        """Return minus the match that the order of service follows."""
        tokens, scope = tokens_of(text_of(waiting.body)), self._scope(waiting)
        own = self._matched(tokens, scope) if self.own_order else 0
        foreign = self._matched(tokens, None) if "reply_order" in self.leaks else 0
        return -max(own, foreign)

    def _serve(self, waiting: Waiting) -> httpx.Response:
        body, text = waiting.body, text_of(waiting.body)
        self.bodies.append(body)
        self.seen_headers.append(waiting.request.headers)
        tokens, scope = tokens_of(text), self._scope(waiting)
        found = max(self._matched(tokens, scope), self._leaked(tokens, text, scope))
        cost_ms = self.saved_ms * (len(tokens) - (found if self.caches else 0))
        self.time.seconds += (1.0 + cost_ms + self.chance.expovariate(1 / self.noise_ms)) / 1e3
        shown = self._matched(tokens, None if "cached_tokens" in self.leaks else scope)
        self._keep(tokens, scope)
        usage: dict[str, Any] = {
            "prompt_tokens": len(tokens) + self.uneven * sum(map(ord, tokens[1]))
        }
        if self.reports:
            usage["prompt_tokens_details"] = {"cached_tokens": shown if self.caches else 0}
        return httpx.Response(200, json={"choices": [{"text": "x"}], "usage": usage})

    def _scope(self, waiting: Waiting) -> str:
        headers, body = waiting.request.headers, waiting.body
        scope = NAMES.get(headers.get("authorization", ""), "nobody")
        if "spoofed_headers" in self.leaks:
            scope = headers.get("x-tenant-id", scope)
        if "spoofed_fields" in self.leaks:
            scope = body.get("user", scope)
        if "spoofed_salt" in self.leaks:
            return str(body.get("cache_salt", scope))
        return f"{scope} {body.get('cache_salt', '')}"

    def _matched(self, tokens: tuple[str, ...], scope: str | None) -> int:
        """Return the tokens found in a scope, in any where it is None."""
        scopes = self.scopes if scope is None else {scope}
        return max((self._in_scope(tokens, s) for s in scopes), default=0)

    def _in_scope(self, tokens: tuple[str, ...], scope: str) -> int:
        found = 0
        for end in range(PAGE, len(tokens) + 1, PAGE):
            if (scope, tokens[:end]) not in self.pages:
                break
            self.pages.move_to_end((scope, tokens[:end]))
            found = end
        return found

    def _leaked(self, tokens: tuple[str, ...], text: str, scope: str) -> int:
        """Return what a planted leak lets this request read of others."""
        planted: Mapping[str, Callable[[], bool]] = {
            "ttft": lambda: True,
            "sybils": lambda: len(self.senders.get(tokens, set()) - {scope}) >= 2,
            "no_key": lambda: scope.startswith("nobody"),
            "boundary": lambda: is_cut(tokens),
            "empty": lambda: text[:1] in BLANKS,
            "sentinel": lambda: any(word in text for word in SENTINELS),
        }
        if any(name in self.leaks and reads() for name, reads in planted.items()):
            return self._matched(tokens, None)
        if "collision" in self.leaks and tokens not in self.senders:
            alike = any(sorted(tokens) == sorted(t) and tokens[:3] == t[:3] for t in self.senders)
            return len(tokens) if alike else 0
        return 0

    def _keep(self, tokens: tuple[str, ...], scope: str) -> None:
        self.senders.setdefault(tokens, set()).add(scope)
        for end in range(PAGE, len(tokens) + 1, PAGE):
            self.pages[scope, tokens[:end]] = None
            self.pages.move_to_end((scope, tokens[:end]))
        self.scopes.add(scope)
        if len(self.pages) > self.capacity_pages:
            shared = "eviction" in self.leaks
            mine = [key for key in self.pages if shared or key[0] == scope]
            for key in mine[: max(0, len(mine) - self.capacity_pages)]:
                del self.pages[key]
