"""Asks the target and takes the time: one token per prompt, no faster than allowed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from kvkeep.audit.target import Account
from kvkeep.errors import AuditError

RETRIES: Final = 6
RETRY_CAP_S: Final = 10.0
BUSY: Final = frozenset({429, 503})
COMPLETIONS: Final = "v1/completions"
CHAT: Final = "v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent: a text, and what else a channel puts into the request."""

    text: str
    headers: tuple[tuple[str, str], ...] = ()
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    seconds: float
    """From sending to the end of a one-token answer: the time to the first token."""
    prompt_tokens: int | None
    cached_tokens: int | None
    rank: int = 0
    """How many of the same burst had been answered before."""


class Refused(AuditError):
    """The target answered a request with an error status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Prober:
    """Sends prompts to one target."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        model: str,
        *,
        per_second: float,
        clock: Clock,
        answer_tokens: int = 1,
    ) -> None:
        self._client = client
        self._model = model
        self._answer_tokens = answer_tokens
        self._gap_s = 1.0 / per_second
        self._clock = clock
        self._due = clock.now()
        self._path = COMPLETIONS
        self.alone = asyncio.Lock()
        """Held by the channel whose turn it is."""
        self.requests = 0
        self.unequal = 0
        """Pairs left out because the target counted their tokens differently."""

    @property
    def clock(self) -> Clock:
        """Return the clock that replies are timed with."""
        return self._clock

    async def settle(self, seconds: float) -> None:
        """Wait for what the target does in the background; it is another channel's turn then.

        The caller holds `alone`.
        """
        if seconds:
            self.alone.release()
            try:
                await self._clock.sleep(seconds)
            finally:
                await self.alone.acquire()

    async def choose_endpoint(self, account: Account, text: str) -> Reply:
        """Find out if the target completes texts or only chats; returns its first reply."""
        try:
            return await self.ask(account, Prompt(text))
        except Refused as refused:
            if refused.status not in {404, 405}:
                raise
        self._path = CHAT
        return await self.ask(account, Prompt(text))

    async def accepts(self, account: Account, prompt: Prompt) -> bool:
        """Tell whether the target answers such a request at all."""
        try:
            await self.ask(account, prompt)
        except Refused as refused:
            if refused.status >= 500:
                raise
            return False
        return True

    async def ask(self, account: Account, prompt: Prompt) -> Reply:
        """Send one prompt; raises `Refused` where the target does."""
        attempt = 0
        while True:
            await self._turn()
            begun = self._clock.now()
            response = await self._post(account, prompt)
            took = self._clock.now() - begun
            attempt += 1
            if response.status_code not in BUSY or attempt == RETRIES:
                return _reply(response, took, account)
            await self._clock.sleep(min(RETRY_CAP_S, _retry_after(response, attempt)))

    async def burst(self, account: Account, prompts: Sequence[Prompt]) -> list[Reply]:
        """Send prompts at once, in order; each reply tells how many came before it."""
        await self._turn()
        self._due += self._gap_s * (len(prompts) - 1)
        answered = 0

        async def one(prompt: Prompt) -> Reply:
            nonlocal answered
            begun = self._clock.now()
            response = await self._post(account, prompt)
            took, rank, answered = self._clock.now() - begun, answered, answered + 1
            found = _reply(response, took, account)
            return Reply(found.seconds, found.prompt_tokens, found.cached_tokens, rank)

        replies = await asyncio.gather(*map(one, prompts), return_exceptions=True)
        failed = next((reply for reply in replies if isinstance(reply, BaseException)), None)
        if failed is not None:
            raise failed
        return [reply for reply in replies if isinstance(reply, Reply)]

    async def _turn(self) -> None:
        """Keep to the allowed rate."""
        wait = self._due - self._clock.now()
        if wait > 0:
            await self._clock.sleep(wait)
        self._due = max(self._due, self._clock.now()) + self._gap_s

    async def _post(self, account: Account, prompt: Prompt) -> httpx.Response:
        content: dict[str, object] = (
            {"prompt": prompt.text}
            if self._path == COMPLETIONS
            else {"messages": [{"role": "user", "content": prompt.text}]}
        )
        body = {
            "model": self._model,
            "max_tokens": self._answer_tokens,
            "temperature": 0,
            **content,
        }
        body |= dict(prompt.fields)
        headers = {"Authorization": f"Bearer {account.key}"} if account.key else {}
        headers |= dict(prompt.headers)
        self.requests += 1
        try:
            return await self._client.post(self._path, json=body, headers=headers)
        except httpx.HTTPError as error:
            kind = type(error).__name__
            raise AuditError(
                f"url: no answer from {self._client.base_url} ({kind}); check that it is running"
            ) from None


async def first_model(client: httpx.AsyncClient, account: Account) -> str:
    """Return the name of the first model that the target lists."""
    try:
        response = await client.get("v1/models", headers={"Authorization": f"Bearer {account.key}"})
    except httpx.HTTPError:
        raise AuditError(f"url: no server answers at {client.base_url}; check it") from None
    if response.status_code != httpx.codes.OK:
        raise _refusal(response.status_code, account)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise AuditError("model: the target lists none; name one with --model") from None


def _retry_after(response: httpx.Response, attempt: int) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        return 0.1 * 2.0**attempt


def _reply(response: httpx.Response, seconds: float, account: Account) -> Reply:
    if response.status_code != httpx.codes.OK:
        raise _refusal(response.status_code, account)
    try:
        body = json.loads(response.content)
    except ValueError:
        body = None
    if not isinstance(body, dict) or "choices" not in body:
        raise AuditError("url: the answer is not OpenAI's; give the root of such an API")
    usage = body.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return Reply(seconds, _count(usage, "prompt_tokens"), _count(details, "cached_tokens"))


def _count(counts: Mapping[str, Any], name: str) -> int | None:
    value = counts.get(name)
    return value if isinstance(value, int) else None


def _refusal(status: int, account: Account) -> Refused:
    """Return the error of a status; the target's own text may hold anything and is left out."""
    if status in {401, 403}:
        sentence = f"key: the target refuses {account.name} with {status}; give a valid key"
    elif status in BUSY:
        sentence = f"rate: the target stays busy ({status}); lower --rate"
    elif status == 404:
        sentence = "model: the target does not know it (404); name one it serves with --model"
    else:
        sentence = f"url: the target refuses a prompt with {status}; see its log"
    return Refused(status, sentence)
