"""An engine in its own spawned process: no interpreter lock is shared with the server."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from kvkeep.engine import messages as m
from kvkeep.engine.client import MessageClient, Progress
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import mode_of
from kvkeep.shield.folder import is_sealed
from kvkeep.shield.secret import forbid_dumps, overwrite_freed, overwriting_children

if TYPE_CHECKING:
    from kvkeep.engine.engine import EngineCore
    from kvkeep.engine.loop import Beside


class PipeTransport:
    """Runs the loop in a spawned process, messages over a pipe as msgpack."""

    def __init__(self, main: Callable[[Connection], None], *, overwrites: bool = False) -> None:
        """`main` runs there, given the process's end of the pipe; it must be picklable.

        `overwrites`: memory is overwritten there as it is freed.
        """
        self._around = overwriting_children if overwrites else nullcontext
        context = mp.get_context("spawn")
        self._pipe, self._child_pipe = context.Pipe()
        self._process = context.Process(
            target=main, args=(self._child_pipe,), name="kvkeep-engine", daemon=True
        )
        self._sending = threading.Lock()

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        """Start the process and a thread that reads its replies."""
        with self._around():
            self._process.start()
        self._child_pipe.close()
        threading.Thread(
            target=_read_replies, args=(self._pipe, deliver), name="kvkeep-replies", daemon=True
        ).start()

    def send(self, command: m.Command) -> None:
        """Write a command to the pipe; a dead process is told by the reading thread."""
        try:
            with self._sending:
                self._pipe.send_bytes(m.encode(command))
        except (BrokenPipeError, ConnectionResetError, OSError):
            return

    def join(self, timeout_s: float) -> None:
        """Wait for the process, then terminate it."""
        self._process.join(timeout_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout_s)


def spawn_engine(options: EngineOptions, progress: Progress | None = None) -> MessageClient:
    """Return a client of an engine in a process; call inside a running event loop."""
    tile = options.shield == "tile"
    if tile:
        overwrite_freed()
    return MessageClient(PipeTransport(partial(_main, options), overwrites=tile), progress)


def _read_replies(pipe: Connection, deliver: Callable[[m.Reply], None]) -> None:
    try:
        while True:
            deliver(m.decode_reply(pipe.recv_bytes()))
    except (EOFError, OSError):
        deliver(m.Failed("EngineStopped", "the engine process ended"))


def _main(options: EngineOptions, pipe: Connection) -> None:
    """Run an engine alone; ends when the parent stops it or goes away."""
    from kvkeep.engine.build import build_core  # noqa: PLC0415 - torch loads in this process alone

    run_loop(options, pipe, lambda reply: build_core(options, reply))


def run_loop(
    options: EngineOptions,
    pipe: Connection,
    build: Callable[[m.Sink], EngineCore],
    beside: Callable[[m.Inbox], Beside] | None = None,
) -> None:
    """Run the loop over a pipe; `beside` makes what works on its thread, given its queue."""
    from kvkeep.engine import loop  # noqa: PLC0415 - torch loads in this process alone

    secret = mode_of(options) != "off" or is_sealed(Path(options.model).expanduser())
    if secret and not options.keys.dumps:
        forbid_dumps()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the server's to handle
    inbox: m.Inbox = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(pipe, inbox), daemon=True).start()
    companion = None if beside is None else beside(inbox)
    loop.run(build, inbox, lambda r: _reply(pipe, r), companion)


def _read_commands(pipe: Connection, inbox: m.Inbox) -> None:
    try:
        while True:
            inbox.put(m.decode_command(pipe.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)  # the server is gone; nobody is left to answer


def _reply(pipe: Connection, reply: m.Reply) -> None:
    try:
        pipe.send_bytes(m.encode(reply))
    except (BrokenPipeError, OSError):
        os._exit(0)  # as above
