"""What the monitor tells the operator: lines without content, and a webhook that may fail."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import msgspec

from kvkeep.errors import ConfigError

WAITING = 64
"""Alerts that wait for the webhook; more are dropped."""

log = logging.getLogger(__name__)


class Alert(msgspec.Struct, frozen=True):
    """One finding about one tenant; no text, no token, no page."""

    time: float
    tenant: str
    rule: str
    action: str
    value: float
    limit: float


class AlertSink(Protocol):
    """Takes alerts; never raises and never blocks for long."""

    def send(self, alert: Alert) -> None:
        """Take one."""


@dataclass(slots=True)
class AlertCounts:
    """What became of alerts."""

    sent: int = 0
    failed: int = 0
    dropped: int = 0


class NoSink:
    """Drops alerts."""

    def send(self, alert: Alert) -> None:
        """Drop it."""


class AuditLog:
    """Appends a JSON line per alert to a file of mode 0600, and hands it on."""

    def __init__(self, path: Path, onward: AlertSink) -> None:
        self._path = path
        self._onward = onward
        self.counts = AlertCounts()

    def prepare(self) -> None:
        """Make the file; raises `ConfigError` where that fails, before anybody relies on it."""
        try:
            self._make()
        except OSError as error:
            raise ConfigError(
                f"share_audit_log: can't write {self._path}: {error.strerror}; name another file"
            ) from None

    def _make(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        with self._path.open("ab"):
            pass

    def send(self, alert: Alert) -> None:
        """Write the line; a full disk must not stop the engine."""
        try:
            self._make()
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(alert) + b"\n")
            self.counts.sent += 1
        except OSError as error:
            self.counts.failed += 1
            log.warning("an alert could not be written: %s", type(error).__name__)
        self._onward.send(alert)


class Webhook:
    """Posts alerts as JSON from a thread of its own."""

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._waiting: queue.Queue[Alert] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self.counts = AlertCounts()

    def send(self, alert: Alert) -> None:
        """Queue an alert; a full queue drops it."""
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            self.counts.dropped += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvkeep-webhook", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Wait until all queued alerts are posted or given up."""
        self._waiting.join()

    def _run(self) -> None:
        while True:
            self._post(self._waiting.get())
            self._waiting.task_done()

    def _post(self, alert: Alert) -> None:
        try:
            body = msgspec.json.encode(alert)
            headers = {"content-type": "application/json"}
            answer = httpx.post(self._url, content=body, headers=headers, timeout=self._timeout_s)
            answer.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL):
            self.counts.failed += 1
        else:
            self.counts.sent += 1
