"""What runners of other engines measure and answer, with a fake engine and a fake server."""

from __future__ import annotations

import io
import json
import random
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tools.peers import build, protocol
from tools.peers.completions import CompletionsPeer
from tools.peers.protocol import Loaded, Measured, fresh_prompt, window


def test_the_window_is_where_all_sequences_decode() -> None:
    assert window([[0.0, 1.0, 2.0, 3.0], [1.5, 2.5, 3.5]]) == Measured(3, 1.5)
    assert window([[0.0, 1.0, 2.0]]) == Measured(2, 2.0)
    with pytest.raises(ValueError, match="more tokens"):
        window([[0.0], [1.0]])


def test_prompts_are_fresh_and_avoid_special_tokens() -> None:
    rng = random.Random(0)
    first, second = (fresh_prompt(64, 400, rng) for _ in range(2))
    assert first != second
    assert all(100 <= token < 300 for token in first + second)


def test_a_longer_prefix_begins_with_a_shorter_one() -> None:
    seen: list[list[int]] = []

    class Listening(FakePeer):
        def prefill(self, prompt: Sequence[int]) -> Measured:
            seen.append(list(prompt))
            return Measured(len(prompt), 1.0)

    loaded = Loaded("fake", "1", {}, Listening(), 5000)
    for length in (64, 128):
        request = {"batch": 2, "prefix": length, "prompt": 8, "tokens": 4}
        protocol._measure(loaded, "fanout", request, random.Random(length))
    assert [len(prefix) for prefix in seen] == [64, 128]
    assert seen[1][:64] == seen[0]


class FakePeer:
    def prefill(self, prompt: Sequence[int]) -> Measured:
        return Measured(len(prompt), 2.0)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
        if tokens > 100:
            raise RuntimeError("too long")
        return Measured(len(prompts) * tokens, 4.0)

    def close(self) -> None:
        pass


def test_requests_are_answered_in_turn_and_failures_do_not_end_the_runner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests: list[dict[str, object]] = [
        {"run": "prefill"},
        {"run": "decode_b8", "tokens": 16},
        {"run": "decode_b1", "tokens": 101},
        {"run": "other"},
        {"run": "stop"},
        {"run": "prefill"},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, requests))))
    replies = io.StringIO()
    loaded = Loaded("fake", "1", {"dtype": "none"}, FakePeer(), 5000)
    protocol._answer(loaded, random.Random(0), replies)
    ready, prefill, batch, failed, unknown = map(json.loads, replies.getvalue().splitlines())
    assert (ready["peer"], ready["ready"], ready["settings"]) == ("fake", True, {"dtype": "none"})
    assert (prefill["tokens"], prefill["tokens_per_s"]) == (1024, 512.0)
    assert (batch["run"], batch["tokens"], batch["tokens_per_s"]) == ("decode_b8", 128, 32.0)
    assert failed == {"peer": "fake", "run": "decode_b1", "error": "too long"}
    assert "choose prefill" in unknown["error"]


class StreamHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != "known":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        sent = 0
        while sent < body["max_tokens"]:
            sent = min(sent + 2, body["max_tokens"])
            event = {"choices": [{"text": "x"}], "usage": {"completion_tokens": sent}}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StreamHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_is_measured_by_tokens_not_by_events(server_port: int) -> None:
    peer = CompletionsPeer(server_port, "known")
    assert peer.prefill([1, 2, 3]).tokens == 3
    assert peer.decode([[1], [2]], 4000).tokens > 0
    with pytest.raises(RuntimeError, match="404"):
        CompletionsPeer(server_port, "other").prefill([1])


def test_every_recipe_pins_what_it_installs() -> None:
    for recipe in build.RECIPES.values():
        named = [a for call in recipe.installs for a in call if not a.startswith("--")]
        assert all("==" in argument for argument in named)
    digests = {recipe.digest() for recipe in build.RECIPES.values()}
    assert len(digests) == len(build.RECIPES)
