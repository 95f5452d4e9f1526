"""Connections between workers of one host: pages pass through shared memory, records over a socket.

The sender makes a ring in shared memory and names it; each frame's payload is written there once,
and its header goes over a UNIX socket together with its place. The reader copies it out and says
so, which frees the place. Only this user's processes can open socket and ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import secrets
import stat
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from kvkeep.disagg.connector import Channel, Parts
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.tcp import BUFFER_BYTES, StreamChannel
from kvkeep.disagg.wire import Frame, FrameParser, Freed, Mapped, control_bytes
from kvkeep.errors import ConfigError, LinkLost, WireError

FOLDER: Final = Path("/dev/shm")  # noqa: S108 - rings are made under random names, for one user
LEAST_BYTES: Final = 1 << 20
_NAME: Final = re.compile(r"kvkeep-[0-9a-f]{32}")


class Ring:
    """A sender's shared memory: places are taken and freed in the same order."""

    def __init__(self, num_bytes: int) -> None:
        self.name = f"kvkeep-{secrets.token_hex(16)}"
        self.num_bytes = num_bytes
        self._path = FOLDER / self.name
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, num_bytes)  # no room is an error here, not a signal later
            self._memory = mmap.mmap(file, num_bytes)
        except OSError as error:
            self.unlink()
            raise LinkLost(f"{FOLDER} has no room for {num_bytes} bytes: {error}") from None
        finally:
            os.close(file)
        self._at = 0
        self._used = 0
        self._taken: deque[int] = deque()

    def put(self, data: bytes | memoryview) -> int | None:
        """Write data to a place of its own and return where; None where there is no room now.

        Raises `WireError` where there never is.
        """
        size = len(data)
        if size > self.num_bytes:
            raise WireError(f"a frame of {size} bytes is larger than the ring's {self.num_bytes}")
        if not self._used:
            self._at = 0
        wraps = self._at + size > self.num_bytes
        skipped = self.num_bytes - self._at if wraps else 0
        if self._used + skipped + size > self.num_bytes:
            return None
        at = 0 if wraps else self._at
        self._memory[at : at + size] = data
        self._at = at + size
        self._used += skipped + size
        self._taken.append(skipped + size)
        return at

    def free(self) -> None:
        """Free the oldest place; raises `WireError` where none is taken."""
        if not self._taken:
            raise WireError("a worker freed more of a ring than was taken")
        self._used -= self._taken.popleft()

    def unlink(self) -> None:
        """Take the name away: who has it open keeps it."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the memory back."""
        self.unlink()
        self._memory.close()


class ShmChannel:
    """A `Channel` between two processes of one host."""

    def __init__(self, stream: StreamChannel, ring_bytes: int) -> None:
        self._stream = stream
        self._ring_bytes = ring_bytes
        self._ring: Ring | None = None
        self._theirs: tuple[str, mmap.mmap] | None = None
        self._freed = asyncio.Event()
        self._putting = asyncio.Lock()
        self.stats = stream.stats

    async def send(self, parts: Parts) -> None:
        """Send whole frames; a payload beside its header goes through the ring."""
        if len(parts) == 1:
            await self._stream.send(parts)
            return
        header, payload = parts
        async with self._putting:
            if self._ring is None:
                self._ring = Ring(self._ring_bytes)
            while (at := self._ring.put(payload)) is None:
                self._freed.clear()
                await self._freed.wait()
            record = Mapped(self._ring.name, self._ring.num_bytes, at, bytes(header))
            await self._stream.send((control_bytes(record),))
        self.stats.sent_pages_frames += 1
        self.stats.sent_pages_bytes += len(payload)

    async def receive(self) -> Frame:
        """Return the next frame that is not about the rings themselves."""
        while True:
            frame = await self._stream.receive()
            record = None if frame.block is not None else frame.control()
            if isinstance(record, Mapped):
                found = self._read(record)
                await self._stream.send((control_bytes(Freed()),))
                return found
            if not isinstance(record, Freed):
                return frame
            if self._ring is None:
                raise WireError("a worker freed a ring that there is not")
            self._ring.free()
            self._ring.unlink()
            self._freed.set()

    def close(self) -> None:
        """End the connection, and give the memory back."""
        self._stream.close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._theirs is not None:
            self._theirs[1].close()
            self._theirs = None

    def _read(self, record: Mapped) -> Frame:
        """Return a frame whose payload lies in the other side's ring; raises `WireError`."""
        memory = self._open(record)
        parser = FrameParser()
        if list(parser.feed(record.header)):
            raise WireError("a frame in shared memory has no payload")
        size = parser.held_bytes
        if record.at + size > len(memory):
            raise WireError("a frame lies outside its ring")
        with memoryview(memory) as whole, whole[record.at : record.at + size] as payload:
            frames = list(parser.feed(payload))
        if len(frames) != 1 or frames[0].block is None:
            raise WireError("what lies in shared memory is no frame of pages")
        return frames[0]

    def _open(self, record: Mapped) -> mmap.mmap:
        if self._theirs is None or self._theirs[0] != record.ring:
            if self._theirs is not None:
                raise WireError("a worker uses one ring")
            self._theirs = (record.ring, open_ring(record.ring, record.num_bytes))
        return self._theirs[1]


def open_ring(name: str, num_bytes: int) -> mmap.mmap:
    """Return another process's ring for reading; raises `WireError` where it is not this user's."""
    if not _NAME.fullmatch(name):
        raise WireError("a ring's name is none that a worker gives")
    try:
        file = os.open(FOLDER / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise WireError(f"a ring can't be opened: {error.strerror}") from None
    try:
        found = os.fstat(file)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
        if not own or found.st_size != num_bytes or num_bytes < 1:
            raise WireError("a ring is another user's, or not as long as was said")
        return mmap.mmap(file, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(file)


class ShmConnector:
    """Makes connections through shared memory; a `Connector`."""

    def __init__(self, options: LinkOptions) -> None:
        if options.pace is not None:
            raise ConfigError("pace: shared memory emulates no link; use a tcp address")
        self._options = options
        self._server: asyncio.Server | None = None
        self._ring_bytes = max(options.window_bytes, LEAST_BYTES)
        self._path: Path | None = None

    async def listen(self, address: str, accepted: Callable[[Channel], Awaitable[None]]) -> str:
        """Serve connections, see `Connector.listen`."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await accepted(self._channel(reader, writer))

        path = socket_path(address)
        if address.endswith("/"):
            path /= f"{secrets.token_hex(8)}.sock"
        try:
            self._server = await asyncio.start_unix_server(serve, path, limit=BUFFER_BYTES)
            path.chmod(0o600)
        except OSError as error:
            raise ConfigError(f"listen: {address} can't be used: {error.strerror}") from None
        self._path = path
        return f"shm://{path}"

    async def dial(self, address: str) -> Channel:
        """Connect, see `Connector.dial`."""
        path = socket_path(address)
        try:
            async with asyncio.timeout(self._options.dial_s):
                reader, writer = await asyncio.open_unix_connection(path, limit=BUFFER_BYTES)
        except (TimeoutError, OSError) as error:
            raise LinkLost(f"no worker answers at {address}: {type(error).__name__}") from None
        return self._channel(reader, writer)

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _channel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> ShmChannel:
        stream = StreamChannel(reader, writer, self._options, "shared memory")
        return ShmChannel(stream, self._ring_bytes)


def socket_path(address: str) -> Path:
    """Return the path of `shm://PATH`; raises `ConfigError`."""
    scheme, _, path = address.partition("://")
    if scheme != "shm" or not path.startswith("/"):
        raise ConfigError(f"listen: {address!r} is no address; use shm:///run/kvkeep.sock")
    return Path(path)
