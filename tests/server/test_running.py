"""A tenant's places: never more than its cap, each freed once and before the last byte."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from starlette.types import ASGIApp, Message, Scope

from kvkeep.engine.api import GenerateRequest
from kvkeep.errors import TooManyRequests
from kvkeep.server.app import create_app
from kvkeep.server.frontend import Frontend
from kvkeep.server.identity import Identity
from kvkeep.server.options import ServerOptions
from kvkeep.server.running import Running
from kvkeep.server.store import TenantStore
from kvkeep.server.tenants import TenantFile
from tests.server.conftest import wait_for
from tests.server.fakes import MODEL, ByteText, FakeEngine

BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": ["hi", "ho"], "n": 2},
}


class Hung(OSError):
    """The client's connection is lost."""


@dataclass
class Caller:
    """Sends a request in the very moment in which the answer to the one before is complete."""

    app: ASGIApp
    key: str
    path: str
    body: dict[str, object]
    left: int
    """Requests to come after this one."""
    hang_up: bool = False
    """Whether the last byte of an answer meets a lost connection."""
    statuses: list[int] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)

    async def ask(self) -> None:
        raw = msgspec.json.encode({"model": MODEL, **self.body})
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        await self.app(self._scope(), inbox.get, self._send)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])
            return
        self.texts.append(message["body"])
        if not message.get("more_body", False) and self.left:
            self.left -= 1
            await self.ask()
            if self.hang_up:
                raise Hung

    def _scope(self) -> Scope:
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        return {
            "type": "http",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            "client": ("127.0.0.1", 5000),
        }


@dataclass
class CountingEngine(FakeEngine):
    """Knows how many requests ran at most at a time."""

    most: int = 0

    def count(self, _request: GenerateRequest) -> Exception | None:
        self.most = max(self.most, len(self.live))
        return None


def one_prompt_fails(request: GenerateRequest) -> Exception | None:
    return ValueError("x") if request.prompt_ids[-1] == ord("o") else None


async def closed_loop(folder: Path, engine: FakeEngine, caller: dict[str, object]) -> Caller:
    """Return a caller of a tenant with one place, all its requests answered, all places free."""
    file = TenantFile(folder / "tenants.json")
    key = file.add("acme", share=0.5, concurrency=1).text
    app = create_app(engine, ByteText(), TenantStore.open(file.path), ServerOptions())
    front: Frontend = app.state.frontend
    chosen = Caller(app, key, **caller)  # type: ignore[arg-type]
    async with front.alive():
        await wait_for(lambda: front.model)
        await chosen.ask()
        assert len(front.running) == 0
        await chosen.ask()  # the place is free again
    return chosen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_whoever_has_read_the_last_byte_may_ask_again(
    tmp_path: Path, path: str, stream: bool
) -> None:
    engine = CountingEngine()
    engine.fail_with = engine.count
    body = {**BODIES[path], "stream": stream, "max_tokens": 3}
    caller = await closed_loop(tmp_path, engine, {"path": path, "body": body, "left": 3})
    assert caller.statuses == [200] * 5
    assert b"error" not in b"".join(caller.texts)
    assert engine.most == len(engine.requests) // 5  # the prompts of one HTTP request


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_fails_frees_the_place_before_it_says_so(
    tmp_path: Path, stream: bool
) -> None:
    engine = FakeEngine(delay_s=0.001, fail_after=2, fail_with=one_prompt_fails)
    body = {"prompt": ["hi", "ho"], "stream": stream, "max_tokens": 13}
    caller = await closed_loop(
        tmp_path, engine, {"path": "/v1/completions", "body": body, "left": 2}
    )
    assert caller.statuses == [200 if stream else 500] * 4
    assert b"".join(caller.texts).count(b"internal_error") == 4
    assert len(engine.closed) == 8
    assert not engine.live


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_lost_at_the_last_byte_frees_the_place_once(
    tmp_path: Path, stream: bool
) -> None:
    path = "/v1/completions"
    body = {**BODIES[path], "stream": stream, "max_tokens": 3}
    asked = {"path": path, "body": body, "left": 2, "hang_up": True}
    caller = await closed_loop(tmp_path, FakeEngine(), asked)
    assert caller.statuses == [200] * 4


def test_a_place_is_freed_once_and_its_job_is_still_found() -> None:
    running, who = Running(), Identity("acme", "k", 2)
    with running.admit("one", who) as one, running.admit("two", who) as two:
        with pytest.raises(TooManyRequests), running.admit("three", who):
            pass
        running.release(one)
        running.release(one)
        with running.admit("three", who):
            assert len(running) == 3
            running.release(one)
            with pytest.raises(TooManyRequests), running.admit("four", who):
                pass
        assert running.cancel_where(lambda _: True, lambda: Hung("gone")) == 2
        assert isinstance(one.error, Hung)
        assert isinstance(two.error, Hung)
    assert len(running) == 0
    with running.admit("five", who), running.admit("six", who):
        assert len(running) == 2
