"""An engine in a thread of this process: for tests and the Python API."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from kvkeep.engine import loop
from kvkeep.engine import messages as m
from kvkeep.engine.engine import EngineCore


class ThreadTransport:
    """Runs the loop in a daemon thread."""

    def __init__(self, build: Callable[[loop.Sink], EngineCore]) -> None:
        self._build = build
        self._inbox: loop.Inbox = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=loop.run,
            args=(self._build, self._inbox, deliver),
            name="kvkeep-engine",
            daemon=True,
        )
        self._thread.start()

    def send(self, command: m.Command) -> None:
        """Queue a command."""
        self._inbox.put(command)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout_s)
