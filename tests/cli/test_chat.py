from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvkeep.cli import run
from kvkeep.cli.chat import Message, api_key, converse, delta, server_answers
from kvkeep.errors import ConfigError, RequestError

KEY = "a key"
MODELS = {"data": [{"id": "toy"}]}
UNAUTHORISED = {"error": {"message": "no valid key"}}


class FakeServer(BaseHTTPRequestHandler):
    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {KEY}"
        self.reply(200 if known else 401, json.dumps(MODELS if known else UNAUTHORISED).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = [*body["messages"][-1]["content"].split(), body["model"]]
        events = [{"choices": [{"delta": {"content": word}}]} for word in words]
        lines = [f"data: {json.dumps(e)}" for e in events]
        self.reply(200, "\n\n".join([": keep-alive", *lines, "data: [DONE]", ""]).encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


async def test_answers_stream_from_a_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with server_answers(url, KEY, 8) as answer:
        assert await answer([{"role": "user", "content": "one two"}]) == "onetwotoy"
    assert "onetwotoy" in capsys.readouterr().out


async def test_a_refusal_says_what_the_server_said(url: str) -> None:
    with pytest.raises(RequestError, match="no valid key"):
        async with server_answers(url, None, 8):
            pass


async def test_no_server_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no server answers"):
        async with server_answers("http://127.0.0.1:9", None, 8):
            pass


async def test_a_refused_turn_leaves_the_history_as_it_was() -> None:
    seen: list[list[Message]] = []

    async def answer(history: list[Message]) -> str:
        seen.append(list(history))
        if history[-1]["content"] == "bad":
            raise RequestError("too long")
        return "yes"

    lines = iter(["good", "", "bad", "again", None])
    await converse(answer, lambda: next(lines))
    assert [m["content"] for m in seen[-1]] == ["good", "yes", "again"]


def test_delta_raises_what_a_stream_ends_with() -> None:
    assert delta(": comment") == ""
    assert delta("data: [DONE]") == ""
    assert delta('data: {"choices": []}') == ""
    with pytest.raises(RequestError, match="stopped"):
        delta('data: {"error": {"message": "stopped"}}')


def test_the_key_comes_from_its_file_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    assert api_key(None) == "of the environment"
    (tmp_path / "key").write_text("of the file\n")
    assert api_key(tmp_path / "key") == "of the file"
    with pytest.raises(ConfigError, match="api_key_file"):
        api_key(tmp_path / "gone")


def test_a_conversation_ends_with_the_input(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n"))
    assert run(["chat", "--url", url, "--api-key-file", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out == "onetwotoy\n"
