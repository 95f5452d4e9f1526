"""How frames travel: the protocol of a connection, and what every kind of one shares."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from kvkeep.disagg.options import PaceOptions
from kvkeep.disagg.wire import Frame

CATCH_UP_S: Final = 0.05
"""How far a pacer runs ahead of its writer: what a late timer has cost is made up for."""
SLICE_BYTES: Final = 64 << 10

Parts = Sequence[bytes | memoryview]


@dataclass(slots=True)
class LinkStats:
    """What one connection has carried."""

    name: str
    """The kind of connection; an emulated link says that it is one."""
    sent_bytes: int = 0
    sent_pages_bytes: int = 0
    """Of these, in frames of pages or rows."""
    sent_pages_frames: int = 0
    received_bytes: int = 0


class Channel(Protocol):
    """One connection between two workers; used by one event loop."""

    stats: LinkStats

    async def send(self, parts: Parts) -> None:
        """Send whole frames; waits while too much is under way. Raises `LinkLost`."""

    async def receive(self) -> Frame:
        """Return the next frame; raises `WireError`, or `LinkLost` where nothing comes."""

    def close(self) -> None:
        """End the connection; both sides' calls raise `LinkLost` from now on."""


class Connector(Protocol):
    """Makes connections of one kind."""

    async def listen(self, address: str, accepted: Callable[[Channel], Awaitable[None]]) -> str:
        """Serve every connection made to an address by a task; return the address as dialled.

        Raises `ConfigError` where that can't or must not be listened at.
        """

    async def dial(self, address: str) -> Channel:
        """Connect; raises `LinkLost` where nobody answers, `ConfigError` where that may not be."""

    def close(self) -> None:
        """Listen no more."""


class _Booked(NamedTuple):
    """Bytes that an emulated link hands on at a time of the pacer's clock."""

    due_s: float
    data: bytes | memoryview


class Pacer:
    """Emulates a link: bytes leave at its bandwidth and are handed on after its latency."""

    def __init__(
        self,
        options: PaceOptions,
        write: Callable[[bytes | memoryview], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._write = write
        self._clock = clock
        self._free_s = clock()
        self._booked: deque[_Booked] = deque()
        self._there = asyncio.Event()

    def name(self, kind: str) -> str:
        """Return what such a connection is called."""
        gbit, latency_ms = self._options.bytes_per_s * 8e-9, self._options.latency_s * 1e3
        return f"{kind}, emulated link of {gbit:g} Gbit/s and {latency_ms:g} ms"

    async def send(self, parts: Parts) -> None:
        """Put bytes on the link; returns once they would have left."""
        for part in parts:
            view = memoryview(part)
            for begin in range(0, len(view), SLICE_BYTES):
                piece = view[begin : begin + SLICE_BYTES]
                begun_s = max(self._free_s, self._clock() - CATCH_UP_S)
                self._free_s = begun_s + len(piece) / self._options.bytes_per_s
                self._booked.append(_Booked(self._free_s + self._options.latency_s, piece))
                self._there.set()
                ahead_s = self._free_s - self._clock()
                if ahead_s > 0:
                    await asyncio.sleep(ahead_s)

    async def run(self) -> None:
        """Hand on what is due, for ever."""
        while True:
            while self._booked:
                due_s, data = self._booked[0]
                late_s = due_s - self._clock()
                if late_s > 0:
                    await asyncio.sleep(late_s)
                self._booked.popleft()
                await self._write(data)
            self._there.clear()
            await self._there.wait()
