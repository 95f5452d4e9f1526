"""An engine in a thread of this process: for tests and the Python API."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from kvkeep.engine import loop
from kvkeep.engine import messages as m
from kvkeep.engine.build import build_core
from kvkeep.engine.client import MessageClient, Progress
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions


class ThreadTransport:
    """Runs the loop in a daemon thread."""

    def __init__(
        self,
        build: Callable[[m.Sink], EngineCore],
        beside: Callable[[m.Inbox], loop.Beside] = lambda _: loop.NothingBeside(),
    ) -> None:
        """`beside` makes what works on the same thread, given the loop's queue."""
        self._build = build
        self._inbox: m.Inbox = queue.SimpleQueue()
        self._beside = beside(self._inbox)
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=loop.run,
            args=(self._build, self._inbox, deliver, self._beside),
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


def local_engine(options: EngineOptions, progress: Progress | None = None) -> MessageClient:
    """Return a client of an engine in a thread; call inside a running event loop."""
    return MessageClient(ThreadTransport(lambda reply: build_core(options, reply)), progress)
