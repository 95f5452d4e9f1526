"""The sending end of a link: a bounded queue, each batch sealed and sent within credits."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from kvkeep.disagg.connector import Channel, LinkStats
from kvkeep.disagg.link import Faults, LinkThread, beat, greet, together
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import (
    Block,
    Control,
    Credit,
    Drop,
    Frame,
    Hello,
    Hold,
    Kind,
    Lost,
    Want,
    WantRows,
    control_bytes,
    pages_header,
)
from kvkeep.errors import LinkLost, SealError, WireError, unexpected


class Batch(NamedTuple):
    """Pages, or rows behind them, to be sent in one frame: copies, layer by layer."""

    block: Block
    pages: PromptPages
    data: tuple[bytes, ...]
    kind: Literal[Kind.PAGES, Kind.OPEN] = Kind.PAGES

    @property
    def size(self) -> int:
        """Return its bytes."""
        return sum(map(len, self.data))

    def seal(self) -> memoryview:
        """Return the frame's payload; raises `SealError`."""
        seal = self.pages.seal if self.kind is Kind.PAGES else self.pages.seal_open
        return seal(self.block, b"".join(self.data))


class Reply(NamedTuple):
    """What rows have gathered, as a frame: it waits for no pages and no credit."""

    header: bytes
    payload: memoryview


Event = Want | WantRows | Hold | Drop | Frame | None
"""What an asker says, or rows that it sends; None: its link has ended."""


class Outlet:
    """One connection of an asker; the engine's thread puts, the link's thread sends."""

    def __init__(
        self,
        channel: Channel,
        thread: LinkThread,
        options: LinkOptions,
        faults: Faults,
        heard: Callable[[Outlet, Event], None],
        room: Callable[[], None],
    ) -> None:
        """`heard` and `room` (there is some again) are called on the link's thread."""
        self._channel = channel
        self._thread = thread
        self._options = options
        self._faults = faults
        self._heard = heard
        self._room = room
        self._queue: deque[Batch | Control] = deque()
        self._replies: deque[Reply] = deque()
        self._counting = threading.Lock()
        self._queued_bytes = 0
        self._dropped: set[int] = set()
        self._there = asyncio.Event()
        self._replied = asyncio.Event()
        self._credited = asyncio.Event()
        self._window_bytes = 0
        self._flying_bytes = 0
        self.closed = False

    @property
    def stats(self) -> LinkStats:
        """Return what the connection has carried."""
        return self._channel.stats

    @property
    def queued_bytes(self) -> int:
        """Return the copies that wait to be sent."""
        return self._queued_bytes

    # On other threads

    def has_room(self, size: int) -> bool:
        """Tell whether so many bytes more may wait; one batch always may."""
        used = self._queued_bytes
        return not self.closed and (used == 0 or used + size <= self._options.queue_bytes)

    def put(self, item: Batch | Control | Reply) -> None:
        """Send something after all that waits, a reply after other replies alone."""
        if self.closed:
            return
        if isinstance(item, Reply):
            self._replies.append(item)
            self._thread.loop.call_soon_threadsafe(self._replied.set)
            return
        if isinstance(item, Batch):
            with self._counting:
                self._queued_bytes += item.size
        self._queue.append(item)
        self._thread.loop.call_soon_threadsafe(self._there.set)

    def drop(self, request: int) -> None:
        """Send no more of a request."""
        self._dropped.add(request)

    # On the link's thread

    async def serve(self, own: Hello) -> None:
        """Serve the asker until either side ends the link."""
        try:
            other = await greet(self._channel, own)
            self._window_bytes = other.window_bytes
            await together(
                self._listen(),
                self._send(),
                self._reply(),
                beat(self._channel, self._options.beat_s),
            )
        except LinkLost as error:
            self._faults.note("a link ended", error)
        except WireError as error:
            self._faults.note("refused", error)
        except Exception as error:  # noqa: BLE001 - one link ends, never the worker
            self._faults.note("a link failed", unexpected(error))
        finally:
            self.closed = True
            self._channel.close()
            self._queue.clear()
            self._replies.clear()
            with self._counting:
                self._queued_bytes = 0
            self._heard(self, None)

    async def _listen(self) -> None:
        while True:
            frame = await self._channel.receive()
            if frame.kind is Kind.ROWS and frame.block is not None:
                self._heard(self, frame)
                continue
            record = frame.control()
            match record:
                case Want() | WantRows() | Hold() | Drop():
                    self._heard(self, record)
                case Credit(count):
                    self._flying_bytes = max(0, self._flying_bytes - count)
                    self._credited.set()

    async def _reply(self) -> None:
        while True:
            while self._replies:
                await self._channel.send(self._replies.popleft())
            self._replied.clear()
            await self._replied.wait()

    async def _send(self) -> None:
        while True:
            if not self._queue:
                self._dropped.clear()
                self._there.clear()
                await self._there.wait()
                continue
            item = self._queue.popleft()
            if not isinstance(item, Batch):
                await self._channel.send((control_bytes(item),))
                continue
            if item.block.request not in self._dropped:
                await self._send_pages(item)
            with self._counting:
                self._queued_bytes -= item.size
            self._room()

    async def _send_pages(self, batch: Batch) -> None:
        block = batch.block
        try:
            payload = batch.seal()
        except SealError as error:
            self._faults.note("sealing", error)
            await self._channel.send((control_bytes(Lost(block.request, block.first_page)),))
            return
        while self._flying_bytes and self._flying_bytes + len(payload) > self._window_bytes:
            self._credited.clear()
            await self._credited.wait()
        self._flying_bytes += len(payload)
        await self._channel.send((pages_header(block, payload, batch.kind), payload))
