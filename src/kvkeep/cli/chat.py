"""`kvkeep chat`: a conversation with a running server, or with a model in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypedDict

import httpx
import typer

from kvkeep.cli.console import NOTES
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import Settings, load
from kvkeep.errors import ConfigError, RequestError

app = new_app("Talk to a running server, or to a model in this process.")


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


Answer = Callable[[list[Message]], Awaitable[str]]
"""Prints the answer to a history as it comes and returns its text."""


def api_key(file: Path | None) -> str | None:
    """Return the key from a file, or from OPENAI_API_KEY."""
    if file is None:
        return os.environ.get("OPENAI_API_KEY")
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"api_key_file: can't read {file}: {error.strerror}") from None


def delta(line: str) -> str:
    """Return the text that one line of a server's event stream adds."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return ""
    event = json.loads(data)
    if "error" in event:
        raise RequestError(event["error"]["message"])
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


@asynccontextmanager
async def server_answers(url: str, key: str | None, max_tokens: int) -> AsyncIterator[Answer]:
    """Yield a function that asks the server at `url`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None) as client:  # noqa: S113 - an answer may take long
        try:
            listed = await client.get("/v1/models")
        except httpx.HTTPError:
            raise ConfigError(
                f"url: no server answers at {url}; start one with `kvkeep serve`"
            ) from None
        body = listed.json()
        if listed.is_error:
            raise RequestError(body["error"]["message"])
        name = body["data"][0]["id"]
        NOTES.print(f"{name} at {url}")

        async def answer(history: list[Message]) -> str:
            body = {"model": name, "messages": history, "stream": True, "max_tokens": max_tokens}
            text = ""
            async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.is_error:
                    raise RequestError(json.loads(await reply.aread())["error"]["message"])
                async for line in reply.aiter_lines():
                    piece = delta(line)
                    text += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            return text

        yield answer


@asynccontextmanager
async def model_answers(settings: Settings, max_tokens: int) -> AsyncIterator[Answer]:
    """Yield a function that asks an engine of our own."""
    from kvkeep.cli.engine import checkpoint_path, running_engine
    from kvkeep.cli.generate import LOCAL, stream
    from kvkeep.engine.api import SamplingParams

    path = checkpoint_path(settings)
    from kvkeep.models.text import TextModel  # a second of imports: after what may be refused

    text = TextModel.load(path)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    async with running_engine(settings) as (client, _):
        await client.set_tenants({LOCAL: 1.0})

        async def answer(history: list[Message]) -> str:
            return await stream(client, tuple(text.apply_chat(history)), params)

        yield answer


async def converse(answer: Answer, read: Callable[[], str | None]) -> None:
    """Read lines and answer them until there are no more."""
    history: list[Message] = []
    while (line := await asyncio.to_thread(read)) is not None:
        if not line.strip():
            continue
        history.append({"role": "user", "content": line})
        try:
            history.append({"role": "assistant", "content": await answer(history)})
        except RequestError as error:
            NOTES.print(f"refused: {error}")
            history.pop()
        sys.stdout.write("\n")


def read_line() -> str | None:
    """Return the next line typed; None at the end or at /quit."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if line.strip() == "/quit" else line


async def _chat(settings: Settings, url: str | None, key: str | None, max_tokens: int) -> None:
    if url is None:
        async with model_answers(settings, max_tokens) as answer:
            await converse(answer, read_line)
    else:
        async with server_answers(url, key, max_tokens) as answer:
            await converse(answer, read_line)


@app.command()
@with_settings(
    "config", "dtype", "weights", "device", "kernel", "threads", "allow_download", "port"
)
def chat(
    settings: Settings,
    model: Annotated[str | None, typer.Option(help="run this model instead of a server")] = None,
    url: Annotated[str | None, typer.Option(help="server (default: this machine's)")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="else OPENAI_API_KEY")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 512,
) -> None:
    """Talk to a running server, or to a model in this process; /quit or end of input ends it."""
    if model is not None:
        flags = settings.model_dump(exclude_unset=True) | {"model": model}
        asyncio.run(_chat(load(flags), None, None, max_tokens))
    else:
        address = url or f"http://127.0.0.1:{settings.port}"
        asyncio.run(_chat(settings, address, api_key(api_key_file), max_tokens))
