"""What both ends of links have: options, what seals pages, a thread, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

from kvkeep.disagg.link import Faults, LinkThread, Waker
from kvkeep.disagg.options import LinkOptions, check_engine
from kvkeep.disagg.prompt import hello_of
from kvkeep.disagg.wire import Hello
from kvkeep.engine import messages as m
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import Seal, Sealing, sealing_of
from kvkeep.errors import ConfigError
from kvkeep.sealing import PageSealer

CLUSTER: Final = "*cluster"
"""Whose shelf tells a key store from others'; no account is called so."""
_SHOWN_BYTES: Final = 8


class Side:
    """Stands beside an engine's loop: `begin` comes first, `close` last."""

    def __init__(
        self,
        engine: EngineOptions,
        options: LinkOptions,
        inbox: m.Inbox,
        clock: Callable[[], float] = time.monotonic,
        seal: Seal = sealing_of,
    ) -> None:
        """Raises `ConfigError` where pages of such an engine can't be handed over."""
        check_engine(engine)
        self._engine = engine
        self._options = options
        self._clock = clock
        self._seal = seal
        self._waker = Waker(inbox)
        self._faults = Faults()
        self._thread: LinkThread | None = None
        self._sealing: Sealing | None = None

    @property
    def faults(self) -> Faults:
        """Return what went wrong on links."""
        return self._faults

    def _open(self, core: EngineCore) -> tuple[Hello, LinkThread, Sealing]:
        """Take note of the engine; return what this worker says of itself, and what it works with.

        Raises `ConfigError` where keys can't be had.
        """
        self._core = core
        self._sealing = sealing = self._seal(self._engine)
        self._thread = thread = LinkThread()
        core.info = msgspec.structs.replace(core.info, sealer=sealer_name(sealing.sealer))
        hello = hello_of(core.info, core.caches.managers, self._options.window_bytes)
        return hello, thread, sealing

    def _close(self, last: Callable[[], None] = lambda: None) -> None:
        """End all links and the keys; `last` is called on the links' thread before."""
        if self._thread is not None:
            self._thread.close(last)
        if self._sealing is not None:
            self._sealing.close()


def sealer_name(sealer: PageSealer) -> str:
    """Return what seals pages and by which store's keys; two that differ open nothing.

    Raises `ConfigError` where the keys can't be had.
    """
    if sealer.name == "off":
        return sealer.name
    shelf = sealer.shelf_of(CLUSTER)
    if shelf is None:
        raise ConfigError("link: the key process gives no keys out; look at shield_keys")
    return f"{sealer.name}, keys {shelf[:_SHOWN_BYTES].hex()}"
