"""The example's search on a scripted model, and its words to a server that speaks from a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam as Message

from examples.tree_of_thought import (
    Level,
    OpenAIModel,
    Read,
    Thought,
    Tried,
    report,
    search,
)
from tests.server.conftest import Start
from tests.server.fakes import MODEL, REPLY, FakeEngine


@dataclass
class Scripted:
    """Answers by depth, and only a bad beginning leads to the best end."""

    asked: list[Sequence[Message]] = field(default_factory=list)
    bytes: int = 0

    async def think(self, messages: Sequence[Message], tries: int) -> Tried:
        self.asked.append(messages)
        self.bytes += 10
        before = [m["content"] for m in messages if m["role"] == "assistant"]
        good = Thought("good", -0.1), Thought("fair", -0.5)
        late = Thought("late", 9.0), Thought("late", 9.0)
        thoughts = late if before == ["fair"] else good
        return Tried(list(thoughts)[:tries], 100 * len(messages), 50 * len(before))

    async def read(self) -> Read | None:
        return Read(self.bytes, 4 * self.bytes)


async def test_the_best_line_is_found_among_those_kept() -> None:
    model = Scripted()
    best, levels = await search(model, "book", ["one?", "two?"], tries=2, keep=2)
    assert best.answers == ("fair", "late")
    assert best.score == pytest.approx(8.5)
    assert [m["role"] for m in best.messages] == ["system"] + 2 * ["user", "assistant"]
    assert levels == [
        Level(1, 2, 200, 0, Read(10, 40)),
        Level(2, 4, 800, 100, Read(20, 80)),
    ]


async def test_lines_that_are_not_kept_end() -> None:
    model = Scripted()
    best, levels = await search(model, "book", ["one?", "two?", "three?"], tries=2, keep=1)
    assert best.answers == ("good", "good", "good")
    assert [level.nodes for level in levels] == [2, 2, 2]


async def test_equal_thoughts_of_a_line_go_on_once() -> None:
    model = Scripted()
    _, levels = await search(model, "book", ["one?", "two?", "three?"], tries=2, keep=9)
    assert [level.nodes for level in levels] == [2, 4, 6], "two of the four were the same"


async def test_a_server_is_asked_for_scored_samples(start: Start) -> None:
    async with (
        start(FakeEngine(cached_tokens=7)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key) as client,
    ):
        model = OpenAIModel(client, MODEL, "", "")
        tried = await model.think([{"role": "user", "content": "hi"}], 3)
        assert [t.text for t in tried.thoughts] == [REPLY[:8]] * 3
        assert [t.score for t in tried.thoughts] == pytest.approx([-0.5] * 3)
        assert tried.cached_tokens == 7
        assert await model.read() is None
        assert server.engine.requests[0].params.n == 3


async def test_the_admin_port_tells_what_was_read(start: Start) -> None:
    async with start() as server, server.admin() as admin:
        token = admin.headers["Authorization"].removeprefix("Bearer ")
        model = OpenAIModel(AsyncOpenAI(api_key="-"), MODEL, server.admin_url, token)
        assert await model.read() == Read(1 << 20, 1 << 21)


def test_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report([Level(1, 4, 1302, 0, Read(1 << 20, 3 << 20)), Level(2, 8, 2640, 2612, None)])
    out = capsys.readouterr().out
    assert "1.0 MiB" in out
    assert "3.0 MiB" in out
    assert "2612" in out
