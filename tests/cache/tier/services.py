"""A real redis-server for tests, and a relay before it that can hang or hang up."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """Run a server that keeps nothing; yield its port."""
    command = shutil.which("redis-server")
    if command is None:
        pytest.skip("redis-server is not installed (make redis-server)")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([command, *options], stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                with suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait()


class Relay:
    """Passes bytes on to a port, keeps them, or hangs up."""

    def __init__(self, port: int) -> None:
        self.mode = "pass"
        self._target = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, mode: str) -> None:
        """Change what becomes of bytes; what is open is hung up."""
        self.mode = mode
        self._hang_up()

    def close(self) -> None:
        self._listener.close()
        self._hang_up()

    def _hang_up(self) -> None:
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._open = []

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.mode == "reset":
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.mode == "pass":
                    target.sendall(data)
