"""Tenants that load a server over HTTP: one that is timed, and a neighbour in its own process."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event as ProcessEvent
from typing import Final

import httpx

PLACES: Final = ("gate", "tower", "bridge", "vault", "cellar", "mill", "office", "stable")
TOKENS_PER_SENTENCE: Final = 16
"""Of the demo model's tokenizer, about."""
TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """How the other tenant behaves."""

    prompt_tokens: int
    max_tokens: int
    clients: int
    """Requests it has under way at a time, at most."""
    per_second: float | None = None
    """Requests it starts per second, evenly spread; None starts one as soon as another ends."""


def client(url: str, key: str) -> httpx.Client:
    """Return a tenant's connection to a server."""
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)


def prompt(chance: random.Random, tokens: int) -> str:
    """Return a text of about so many tokens that shares no page with any other."""
    return " ".join(
        f"The access code of the {chance.choice(PLACES)} {chance.randint(0, 99)} is "
        f"{chance.randint(1000, 9999)}."
        for _ in range(max(1, tokens // TOKENS_PER_SENTENCE))
    )


def first_token_s(opened: httpx.Client, text: str, max_tokens: int) -> float:
    """Return the seconds from sending to the first event, having read the answer to its end."""
    body = _body(text, max_tokens, stream=True)
    begun, first = time.perf_counter(), None
    with opened.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for part in response.iter_raw():
            if first is None and part.startswith(b"data: "):
                first = time.perf_counter() - begun
    if first is None:
        raise RuntimeError("a stream ended without an event")
    return first


@contextmanager
def beside(url: str, key: str, neighbour: Neighbour, seed: int) -> Iterator[None]:
    """Let a neighbour work in a process of its own; at the end of the block it hangs up."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    work = context.Process(target=_work, args=(url, key, neighbour, seed, begun), daemon=True)
    work.start()
    try:
        if not begun.wait(TIMEOUT_S):
            raise RuntimeError("the neighbour did not start")
        yield
        if not work.is_alive():
            raise RuntimeError("the neighbour failed")
    finally:
        work.terminate()
        work.join(TIMEOUT_S)


def _work(url: str, key: str, neighbour: Neighbour, seed: int, begun: ProcessEvent) -> None:
    begun.set()
    asyncio.run(_neighbour(url, key, neighbour, seed))


async def _neighbour(url: str, key: str, neighbour: Neighbour, seed: int) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(
            base_url=url, headers=headers, timeout=TIMEOUT_S, limits=limits
        ) as opened,
        asyncio.TaskGroup() as group,
    ):
        for number in range(neighbour.clients):
            group.create_task(_send(opened, neighbour, number, random.Random(f"{seed} {number}")))


async def _send(
    opened: httpx.AsyncClient, neighbour: Neighbour, number: int, chance: random.Random
) -> None:
    """Be one of the neighbour's clients, for ever."""
    gap_s = neighbour.clients / neighbour.per_second if neighbour.per_second else 0.0
    due = time.monotonic() + gap_s * number / neighbour.clients
    while True:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due = max(due + gap_s, time.monotonic())
        text = prompt(chance, neighbour.prompt_tokens)
        body = _body(text, neighbour.max_tokens, stream=False)
        (await opened.post("/v1/completions", json=body)).raise_for_status()


def _body(text: str, max_tokens: int, *, stream: bool) -> dict[str, object]:
    return {
        "model": "demo",
        "prompt": text,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": stream,
    }
