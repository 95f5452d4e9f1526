from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.audit import WAITING, Alert, AuditLog, NoSink, Webhook

ALERT = Alert(1.0, "eve", "probe share", "notify", 0.9, 0.5)


class Receiver(BaseHTTPRequestHandler):
    status = 200
    bodies: list[bytes] = []  # noqa: RUF012 - a server's class is made per request

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


@pytest.fixture
def server() -> Iterator[tuple[str, type[Receiver]]]:
    handler = type("Handler", (Receiver,), {"bodies": []})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/hook", handler
        http.shutdown()
        thread.join()


def test_an_alert_is_a_line_of_json_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "audit.jsonl"
    log = AuditLog(path, NoSink())
    log.send(ALERT)
    log.send(ALERT)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (
        lines[0]
        == lines[1]
        == {
            "time": 1.0,
            "tenant": "eve",
            "rule": "probe share",
            "action": "notify",
            "value": 0.9,
            "limit": 0.5,
        }
    )
    assert path.stat().st_mode & 0o777 == 0o600
    assert log.counts.sent == 2


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = AuditLog(tmp_path / "file" / "audit.jsonl", NoSink())
    log.send(ALERT)
    assert log.counts.failed == 1


def test_a_log_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "logs" / "audit.jsonl", NoSink())
    log.prepare()
    log.prepare()
    assert (tmp_path / "logs" / "audit.jsonl").read_bytes() == b""
    for path in (tmp_path, tmp_path / "logs" / "audit.jsonl" / "x"):
        with pytest.raises(ConfigError, match=rf"^share_audit_log: can't write {path}: "):
            AuditLog(path, NoSink()).prepare()


def test_the_webhook_posts(server: tuple[str, type[Receiver]]) -> None:
    url, handler = server
    hook = Webhook(url)
    hook.send(ALERT)
    hook.send(ALERT)
    hook.flush()
    assert [json.loads(body)["tenant"] for body in handler.bodies] == ["eve", "eve"]
    assert hook.counts.sent == 2


def test_a_failing_webhook_is_counted_and_silent(server: tuple[str, type[Receiver]]) -> None:
    url, handler = server
    handler.status = 500
    refused, dead, bad = Webhook(url), Webhook("http://127.0.0.1:9/"), Webhook("nonsense")
    for hook in (refused, dead, bad):
        hook.send(ALERT)
        hook.flush()
        assert (hook.counts.sent, hook.counts.failed) == (0, 1)


def test_a_slow_webhook_drops_what_does_not_fit() -> None:
    hook = Webhook("http://127.0.0.1:9/")
    hook._thread = threading.current_thread()
    for _ in range(WAITING + 3):
        hook.send(ALERT)
    assert hook.counts.dropped == 3
