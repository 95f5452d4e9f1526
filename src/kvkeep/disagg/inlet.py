"""The receiving end of a link: asks, opens what comes, gives credit for what was taken."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from kvkeep.disagg.connector import Channel, LinkStats
from kvkeep.disagg.incoming import Arriving
from kvkeep.disagg.link import Faults, LinkThread, beat, connector_of, greet, together
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.wire import (
    Block,
    Control,
    Credit,
    Frame,
    Hello,
    Holds,
    Kind,
    Lost,
    control_bytes,
)
from kvkeep.errors import KvkeepError, LinkLost, SealError, WireError, unexpected


class Inlet:
    """One connection to a prefill worker; the engine's thread asks, the link's thread receives."""

    def __init__(
        self,
        address: str,
        thread: LinkThread,
        options: LinkOptions,
        faults: Faults,
        arrived: Callable[[Inlet, Block, list[memoryview], int], None],
        lost: Callable[[Inlet, int | None, int], None],
        apart: Callable[[Inlet, Frame | int], None],
    ) -> None:
        """`arrived` hears of a block's layers and its frame's bytes.

        `lost` hears of a request, None for all, and from which page on; `apart` of pages that are
        held there, and of what rows have gathered. All are called on the link's thread.
        """
        self.address = address
        self.incoming: dict[int, Arriving] = {}
        """By what each is called on this link."""
        self.closed = False
        self._thread = thread
        self._options = options
        self._faults = faults
        self._arrived = arrived
        self._lost = lost
        self._apart = apart
        self._queue: deque[Control | tuple[bytes, memoryview]] = deque()
        self._there = asyncio.Event()
        self._channel: Channel | None = None

    @property
    def stats(self) -> LinkStats | None:
        """Return what the connection has carried."""
        return None if self._channel is None else self._channel.stats

    def say(self, record: Control | tuple[bytes, memoryview]) -> None:
        """Send a record, or a frame of rows, once there is a connection; on the engine's thread."""
        if not self.closed:
            self._queue.append(record)
            self._thread.loop.call_soon_threadsafe(self._there.set)

    async def run(self, own: Hello) -> None:
        """Receive until the link ends."""
        try:
            connector = connector_of(self._options, self.address)
            self._channel = channel = await connector.dial(self.address)
            await greet(channel, own)
            await together(
                self._receive(channel), self._send(channel), beat(channel, self._options.beat_s)
            )
        except LinkLost as error:
            self._faults.note("a link ended", error)
        except KvkeepError as error:
            self._faults.note("refused", error)
        except Exception as error:  # noqa: BLE001 - one link ends, never the worker
            self._faults.note("a link failed", unexpected(error))
        finally:
            self.closed = True
            if self._channel is not None:
                self._channel.close()
            self._lost(self, None, 0)

    async def _send(self, channel: Channel) -> None:
        while True:
            while self._queue:
                item = self._queue.popleft()
                await channel.send(item if isinstance(item, tuple) else (control_bytes(item),))
            self._there.clear()
            await self._there.wait()

    async def _receive(self, channel: Channel) -> None:
        while True:
            frame = await channel.receive()
            if frame.block is not None:
                if frame.kind is Kind.ROWS:
                    self._apart(self, frame)
                else:
                    await self._open(channel, frame, frame.block)
                continue
            match frame.control():
                case Lost(request, page):
                    self._lost(self, request, page)
                case Holds(request):
                    self._apart(self, request)

    async def _open(self, channel: Channel, frame: Frame, block: Block) -> None:
        incoming = self.incoming.get(block.request)
        size = len(frame.payload)
        if incoming is None or incoming.kind is not frame.kind:  # dropped meanwhile
            await channel.send((control_bytes(Credit(size)),))
            return
        incoming.received_s = time.monotonic()
        incoming.received_bytes += size
        try:
            incoming.check(block)
            layers = incoming.unseal(block, frame.payload)
        except (SealError, WireError) as error:
            self._faults.note("pages that do not open", error)
            await channel.send((control_bytes(Credit(size)),))
            self._lost(self, block.request, min(block.first_page, incoming.end_page))
            return
        self._arrived(self, block, layers, size)
