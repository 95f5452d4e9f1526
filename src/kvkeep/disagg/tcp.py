"""Connections over TCP, with mutual TLS wherever another host could connect."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from kvkeep.addresses import is_loopback
from kvkeep.disagg.connector import Channel, LinkStats, Pacer, Parts
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.tls import LOOK, context_of, refusal
from kvkeep.disagg.wire import HEADER_BYTES, Frame, FrameParser
from kvkeep.errors import ConfigError, LinkLost

READ_BYTES: Final = 256 << 10
BUFFER_BYTES: Final = 1 << 20


class StreamChannel:
    """A `Channel` over a byte stream."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        options: LinkOptions,
        name: str,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._silence_s = options.silence_s
        self._tls = options.tls
        self._parser = FrameParser()
        self._frames: deque[Frame] = deque()
        self._sending = asyncio.Lock()
        self._pacer: Pacer | None = None
        self._pacing: asyncio.Task[None] | None = None
        writer.transport.set_write_buffer_limits(high=BUFFER_BYTES)
        if options.pace is not None:
            self._pacer = Pacer(options.pace, self._write)
            self._pacing = asyncio.create_task(self._pace(self._pacer))
            name = self._pacer.name(name)
        self.stats = LinkStats(name)

    async def send(self, parts: Parts) -> None:
        """Send whole frames, see `Channel.send`."""
        async with self._sending:
            if self._writer.is_closing():
                raise LinkLost("the link to another worker was closed")
            if self._pacer is not None:
                await self._pacer.send(parts)
            else:
                for part in parts:
                    await self._write(part)
        self.stats.sent_bytes += sum(map(len, parts))
        if len(parts) > 1:
            self.stats.sent_pages_frames += 1
            self.stats.sent_pages_bytes += sum(map(len, parts)) - HEADER_BYTES

    async def receive(self) -> Frame:
        """Return the next frame, see `Channel.receive`."""
        while not self._frames:
            try:
                async with asyncio.timeout(self._silence_s):
                    data = await self._reader.read(READ_BYTES)
            except TimeoutError:
                raise LinkLost(
                    f"nothing came from another worker for {self._silence_s} s"
                ) from None
            except OSError as error:
                raise self._broken(error) from None
            if not data:
                raise LinkLost(f"another worker has closed its link{self._unheard()}")
            self.stats.received_bytes += len(data)
            self._frames.extend(self._parser.feed(data))
        return self._frames.popleft()

    def close(self) -> None:
        """End the connection at once."""
        if self._pacing is not None:
            self._pacing.cancel()
        with contextlib.suppress(RuntimeError):  # its event loop has ended before
            self._writer.transport.abort()

    async def _write(self, data: bytes | memoryview) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise self._broken(error) from None

    def _broken(self, error: OSError) -> LinkLost:
        why = refusal(error) or f"{error.strerror or type(error).__name__}{self._unheard()}"
        return LinkLost(f"the link to another worker broke: {why}")

    def _unheard(self) -> str:
        """Return where to look where a certificate may be why nothing ever came."""
        return "" if self._tls is None or self.stats.received_bytes else f" at once; {LOOK}"

    async def _pace(self, pacer: Pacer) -> None:
        try:
            await pacer.run()
        except LinkLost:
            self._writer.transport.abort()


class TcpConnector:
    """Makes TCP connections; a `Connector`."""

    def __init__(self, options: LinkOptions) -> None:
        self._options = options
        self._server: asyncio.Server | None = None
        self._name = "tcp" if options.tls is None else "tls over tcp"

    async def listen(self, address: str, accepted: Callable[[Channel], Awaitable[None]]) -> str:
        """Serve connections, see `Connector.listen`."""
        host, port = self._place(address)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await accepted(StreamChannel(reader, writer, self._options, self._name))

        try:
            self._server = await asyncio.start_server(
                serve, host, port, limit=BUFFER_BYTES, **self._secured(server=True)
            )
        except OSError as error:
            raise ConfigError(f"listen: {address} can't be used: {error.strerror}") from None
        port = int(self._server.sockets[0].getsockname()[1])
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    async def dial(self, address: str) -> Channel:
        """Connect, see `Connector.dial`."""
        host, port = self._place(address)
        secured = self._secured(server=False)
        try:
            async with asyncio.timeout(self._options.dial_s):
                reader, writer = await asyncio.open_connection(
                    host, port, limit=BUFFER_BYTES, **secured
                )
        except TimeoutError:
            raise LinkLost(f"no worker answers at {address}") from None
        except OSError as error:
            why = refusal(error) or type(error).__name__
            raise LinkLost(f"no worker answers at {address}: {why}") from None
        return StreamChannel(reader, writer, self._options, self._name)

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    def _secured(self, *, server: bool) -> dict[str, Any]:
        """Return what asyncio is asked for; who connects and says nothing is not waited for."""
        if self._options.tls is None:
            return {}
        context = context_of(self._options.tls, server=server)
        return {"ssl": context, "ssl_handshake_timeout": self._options.dial_s}

    def _place(self, address: str) -> tuple[str, int]:
        """Return host and port; raises `ConfigError` where others could read what passes."""
        host, port = host_port(address)
        if self._options.tls is None and not is_loopback(host):
            raise ConfigError(
                f"listen: {host} is reached from other hosts, and pages would pass in the clear;"
                " give tls files, or use 127.0.0.1"
            )
        return host, port


def host_port(address: str) -> tuple[str, int]:
    """Return host and port of `tcp://HOST:PORT`; raises `ConfigError`."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not address.startswith("tcp://") or not host or port is None:
        raise ConfigError(f"listen: {address!r} is no address; use tcp://127.0.0.1:0")
    return host, port
