"""A link with faults: passes bytes on between two workers until a test has it fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from kvkeep.disagg.tcp import host_port

Fault = Literal["none", "stall", "drop", "corrupt"]


class FaultyLink:
    """Listens on a port of its own; the fault shows after so many bytes from the dialled side."""

    def __init__(self) -> None:
        self.address = ""
        self.target = ""
        self.fault: Fault = "none"
        self.after_bytes = 0
        self.passed_bytes = 0
        self.connections = 0
        self._broken = False
        self._serving = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def fail(self, fault: Fault, after_bytes: int) -> None:
        """Have a fault show once that many bytes more have passed."""
        self.fault, self.after_bytes, self._broken = fault, self.passed_bytes + after_bytes, False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        self.connections += 1
        try:
            there = await asyncio.open_connection(*host_port(self.target))
        except OSError:  # who listens there has died
            writer.transport.abort()
            return
        self._serving += 1
        both = (
            asyncio.create_task(self._pass(reader, there[1], back=False)),
            asyncio.create_task(self._pass(there[0], writer, back=True)),
        )
        self._tasks.update(both)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        for end in (writer, there[1]):
            end.transport.abort()
        self._serving -= 1

    async def close(self) -> None:
        """End all connections."""
        while self._serving:
            for task in self._tasks:
                task.cancel()
            await asyncio.sleep(0.01)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool
    ) -> None:
        while data := await reader.read(16 << 10):
            broken = self._broken or (back and self.passed_bytes + len(data) > self.after_bytes)
            if self.fault != "none" and broken:
                if self.fault == "drop":
                    self.fault = "none"
                    return
                if self.fault == "stall":
                    self._broken = True
                    continue
                at = max(0, self.after_bytes - self.passed_bytes)
                data = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
                self.fault = "none"
            self.passed_bytes += len(data) * back
            writer.write(data)
            with contextlib.suppress(OSError):
                await writer.drain()


@asynccontextmanager
async def faulty_link() -> AsyncIterator[FaultyLink]:
    """Yield a link that is whole so far and leads nowhere yet."""
    link = FaultyLink()
    server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
    link.address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield link
    finally:
        await link.close()
        server.close()
        await server.wait_closed()
