"""What is not HTTP is answered with an error in OpenAI's shape, and never inside another answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvkeep.server.protocol import Protocol
from tests.server.conftest import Running, Start, wait_for
from tests.server.fakes import FakeEngine

CANARY = b"c4n4ry-7f3a"
MALFORMED = {
    "no request line": CANARY + b"\r\n\r\n",
    "no version": b"GET /" + CANARY + b"\r\n\r\n",
    "a control character": b"GET / HTTP/1.1\r\nX-\x00" + CANARY + b": 1\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost: x\r\n" + CANARY + b"\r\n\r\n",
    "a length that is none": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
}


async def talk(url: str, *parts: bytes) -> bytes:
    """Return all that a server says until it hangs up."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for part in parts:
        writer.write(part)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("kind", MALFORMED)
async def test_what_is_not_http_is_an_error_in_openais_shape(start: Start, kind: str) -> None:
    async with start() as server:
        for url in (server.url, server.admin_url):
            head, _, body = (await talk(url, MALFORMED[kind])).partition(b"\r\n\r\n")
            status, *headers = head.decode().split("\r\n")
            assert status == "HTTP/1.1 400 Bad Request"
            assert "content-type: application/json" in headers
            assert f"content-length: {len(body)}" in headers
            assert json.loads(body) == {
                "error": {
                    "message": "the request is not valid HTTP/1.1",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": "malformed_http",
                }
            }
        async with server.client() as http:
            assert (await http.get("/v1/models")).status_code == 200


def streamed_request(server: Running) -> bytes:
    """Return a request whose body, in chunks, is followed by what is no chunk."""
    body = b'{"model": "tiny", "prompt": "x", "stream": true}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def test_an_answer_under_way_is_not_mixed_with_a_refusal(start: Start) -> None:
    async with start(FakeEngine(delay_s=0.01)) as server:
        said = await talk(server.url, streamed_request(server), MALFORMED["no request line"])
        stream, _, after = said.partition(b"data: [DONE]\n\n")
        assert b"HTTP/1.1 200" in stream
        assert stream.count(b"HTTP/1.1") == 1
        assert after.count(b"HTTP/1.1 400") <= 1
        await wait_for(lambda: not server.engine.live)


class Wire:
    """A transport that notes what is done with it."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("started", "complete", "told"),
    [(False, False, True), (True, False, False), (True, True, True)],
)
def test_in_the_middle_of_an_answer_it_only_hangs_up(
    started: bool, complete: bool, told: bool
) -> None:
    class Cycle:
        response_started = started
        response_complete = complete

    protocol = Protocol.__new__(Protocol)
    wire = protocol.transport = Wire()
    protocol.cycle = Cycle()
    protocol.send_400_response("")
    assert bool(wire.written) == told
    assert wire.closed
