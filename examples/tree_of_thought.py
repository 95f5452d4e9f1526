"""A tree of thought over the OpenAI API: several tries per step, the likeliest lines go on.

A line is a conversation about one long handbook. At each depth every line that was kept asks the
next question and tries several answers (`n` > 1). An answer is worth the mean log-probability of
its tokens, a line the sum over its answers; the best lines are kept, the others end. All of them
hold the handbook, which is read once into the cache, and once a step for as many as pays.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import httpx
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam as Message

from examples.demo import handbook, server
from kvkeep.cli.console import OUT, human_bytes, make_table
from kvkeep.config import DEMO_MODEL
from kvkeep.server.tenants import TenantFile

TEMPERATURE: Final = 1.3
MAX_TOKENS: Final = 8


class Line(NamedTuple):
    """A conversation so far: a path from the root of the tree."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    score: float = 0.0


class Thought(NamedTuple):
    """One try at an answer, and the mean log-probability of its tokens."""

    text: str
    score: float


class Tried(NamedTuple):
    """What one request brought."""

    thoughts: list[Thought]
    prompt_tokens: int
    cached_tokens: int


class Read(NamedTuple):
    """Bytes of K and V that the steps' plans read, and what reading for each alone would have."""

    planned: int
    flat: int


class Level(NamedTuple):
    """One depth of the tree, summed up."""

    depth: int
    nodes: int
    prompt_tokens: int
    cached_tokens: int
    read: Read | None


class Model(Protocol):
    """What the search asks of a model and its server."""

    async def think(self, messages: Sequence[Message], tries: int) -> Tried:
        """Return `tries` answers to a conversation."""

    async def read(self) -> Read | None:
        """Return what attention has read so far; None where nobody tells."""


class OpenAIModel:
    """A model behind the OpenAI API, and kvkeep's admin port beside it."""

    def __init__(self, client: AsyncOpenAI, name: str, admin_url: str, token: str) -> None:
        self._client, self._name = client, name
        self._admin_url, self._token = admin_url, token

    async def think(self, messages: Sequence[Message], tries: int) -> Tried:
        """Sample `tries` answers in one request: one prefill, forked."""
        reply = await self._client.chat.completions.create(
            model=self._name,
            messages=messages,
            n=tries,
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
            logprobs=True,
        )
        thoughts = []
        for choice in reply.choices:
            tokens = (choice.logprobs and choice.logprobs.content) or []
            mean = sum(token.logprob for token in tokens) / max(1, len(tokens))
            thoughts.append(Thought((choice.message.content or "").strip(), mean))
        usage = reply.usage
        details = usage.prompt_tokens_details if usage else None
        cached = (details.cached_tokens or 0) if details else 0
        return Tried(thoughts, usage.prompt_tokens if usage else 0, cached)

    async def read(self) -> Read | None:
        """Return the attention counters of the admin port."""
        if not self._admin_url:
            return None
        async with httpx.AsyncClient() as http:
            headers = {"Authorization": f"Bearer {self._token}"}
            engine = (await http.get(f"{self._admin_url}/ready", headers=headers)).json()["engine"]
        return Read(engine["attention_planned_bytes_total"], engine["attention_flat_bytes_total"])


async def search(
    model: Model, book: str, questions: Sequence[str], *, tries: int, keep: int
) -> tuple[Line, list[Level]]:
    """Return the best line through all questions, and each depth of the tree."""
    lines = [Line(({"role": "system", "content": book},))]
    levels: list[Level] = []
    for depth, question in enumerate(questions, 1):
        turn: Message = {"role": "user", "content": question}
        asked = [(*line.messages, turn) for line in lines]
        before = await model.read()
        tried = await asyncio.gather(*(model.think(messages, tries) for messages in asked))
        after = await model.read()
        grown = [
            Line(
                (*messages, {"role": "assistant", "content": thought.text}),
                (*line.answers, thought.text),
                line.score + thought.score,
            )
            for line, messages, one in zip(lines, asked, tried, strict=True)
            for thought in {t.text: t for t in one.thoughts}.values()
        ]
        lines = sorted(grown, key=lambda line: -line.score)[:keep]
        nodes = sum(len(one.thoughts) for one in tried)
        prompt, cached = (sum(column) for column in zip(*(one[1:] for one in tried), strict=True))
        read = before and after and Read(after.planned - before.planned, after.flat - before.flat)
        levels.append(Level(depth, nodes, prompt, cached, read))
    return lines[0], levels


def report(levels: Sequence[Level]) -> None:
    """Print the table."""
    columns = ("depth", "nodes", "prompt tokens", "cached tokens", "K and V read", "read for each")
    rows = [(*level[:4], *(human_bytes(b) for b in level.read or ())) for level in levels]
    OUT.print(make_table(columns, [(*row, "-", "-")[:6] for row in rows]))


@contextlib.contextmanager
def own_server(model: str) -> Iterator[tuple[str, str, str, str]]:
    """Start a server for one tenant; yield its URL, the key, the admin port's URL and its token."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-tree-") as folder:
        file, token = TenantFile(Path(folder) / "keys.json"), Path(folder) / "admin-token"
        token.touch(0o600)
        token.write_text(secrets.token_urlsafe(32))
        key = file.add("thinker", share=1.0).text
        OUT.print("Starting a server ...")
        with server(file.path, model, "--admin-token-file", str(token)) as (url, admin_url):
            yield url, key, admin_url, token.read_text()


async def think(given: argparse.Namespace, url: str, key: str, admin_url: str, token: str) -> bool:
    """Search and print; return whether later depths found the earlier ones' pages."""
    book, codes = handbook(given.seed)
    places = random.Random(given.seed).sample(list(codes), given.depth)
    questions = [f"What is the access code of the {place}?" for place in places]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key or "-", max_retries=0) as client:
        name = (await client.models.list()).data[0].id
        model = OpenAIModel(client, name, admin_url, token)
        best, levels = await search(model, book, questions, tries=given.tries, keep=given.keep)
    for question, place, answer in zip(questions, places, best.answers, strict=True):
        right = "" if answer == codes[place] else f" (it is {codes[place]})"
        OUT.print(f"  {question}  {answer}{right}")
    report(levels)
    return all(level.cached_tokens > 0 for level in levels[1:])


def main() -> int:
    """Run the search; return 0 where the handbook was read once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--key", default="", help="its API key")
    parser.add_argument("--admin-url", default="", help="its admin port, for the bytes read")
    parser.add_argument("--admin-token", default="")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="what to serve without --url")
    parser.add_argument("--depth", type=int, default=4, help="questions in a line")
    parser.add_argument("--tries", type=int, default=4, help="answers tried per line and question")
    parser.add_argument("--keep", type=int, default=4, help="lines that go on")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    given_address = (given.url, given.key, given.admin_url, given.admin_token)
    known = contextlib.nullcontext(given_address) if given.url else own_server(given.model)
    with known as address:
        found = asyncio.run(think(given, *address))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
