"""What both ends of a link share: a thread with an event loop, greetings, beats."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

from kvkeep.disagg.connector import Channel, Connector
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.shm import ShmConnector
from kvkeep.disagg.tcp import TcpConnector
from kvkeep.disagg.wire import Beat, Hello, check_hello, control_bytes
from kvkeep.engine import messages as m
from kvkeep.errors import WireError

_JOIN_S: Final = 5.0

log = logging.getLogger(__name__)


class LinkThread:
    """A thread of its own for links: an engine's step never waits for one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="kvkeep-link", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends or the thread does; from any thread."""
        self.loop.call_soon_threadsafe(self._begin, work)

    def wait(self, work: Coroutine[Any, Any, str]) -> str:
        """Run something and return its result; not from the thread itself."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self, last: Callable[[], None] = lambda: None) -> None:
        """End everything that runs; `last` is called on the thread before."""
        self.loop.call_soon_threadsafe(last)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_JOIN_S)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.run_until_complete(asyncio.sleep(0))  # for what closed connections leave to do
        self.loop.close()


class Waker:
    """Wakes an engine's loop, once until it has looked."""

    def __init__(self, inbox: m.Inbox) -> None:
        self._inbox = inbox
        self._awake = False

    def wake(self) -> None:
        """Have the loop look; from any thread."""
        if not self._awake:
            self._awake = True
            self._inbox.put(m.Wake())

    def looked(self) -> None:
        """Hear that the loop looks now."""
        self._awake = False

    async def now_and_then(self, every_s: float, wanted: Callable[[], bool]) -> None:
        """Have the loop look for ever, where something may expire."""
        while True:
            await asyncio.sleep(every_s)
            if wanted():
                self.wake()


class Faults:
    """What went wrong on links, by kind; told to the log now and then."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, what: str, why: object) -> None:
        """Count a fault; the first of a kind is logged, and so is each hundredth."""
        self.counts[what] += 1
        if self.counts[what] == 1 or self.counts[what] % 100 == 0:
            log.warning("link: %s (%d times): %s", what, self.counts[what], why)


def connector_of(options: LinkOptions, address: str) -> Connector:
    """Return what makes connections to an address; raises `ConfigError`."""
    return ShmConnector(options) if address.startswith("shm:") else TcpConnector(options)


async def greet(channel: Channel, own: Hello) -> Hello:
    """Exchange greetings; raises `WireError` where the two do not fit, naming both values."""
    await channel.send((control_bytes(own),))
    other = (await channel.receive()).control()
    if not isinstance(other, Hello):
        raise WireError("a worker did not say what it is first")
    check_hello(own, other)
    return other


async def beat(channel: Channel, every_s: float) -> None:
    """Tell the other side for ever that this one is there."""
    record = control_bytes(Beat())
    while True:
        await channel.send((record,))
        await asyncio.sleep(every_s)


async def together(*works: Coroutine[Any, Any, None]) -> None:
    """Run these until the first of them ends; raises what it raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
