"""What both ends of links have: options, what seals pages, a thread, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from kvkeep.cache.manager import CacheManager
from kvkeep.disagg.link import Faults, LinkThread, Waker
from kvkeep.disagg.options import LinkOptions, check_apart, check_engine
from kvkeep.disagg.prompt import PromptPages, hello_of
from kvkeep.disagg.wire import Hello
from kvkeep.engine import messages as m
from kvkeep.engine.api import GenerateRequest, ModelInfo
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import Seal, transfer_seal_of
from kvkeep.errors import SealError
from kvkeep.sealing import PageSealer
from kvkeep.types import PageTag


class Side:
    """Stands beside an engine's loop: `begin` comes first, `close` last."""

    def __init__(
        self,
        engine: EngineOptions,
        options: LinkOptions,
        inbox: m.Inbox,
        clock: Callable[[], float] = time.monotonic,
        seal: Seal = transfer_seal_of,
    ) -> None:
        """Raises `ConfigError` where pages of such an engine can't be handed over."""
        check_engine(engine)
        check_apart(engine, options)
        self._engine = engine
        self._options = options
        self._clock = clock
        self._seal = seal(engine)
        self._waker = Waker(inbox)
        self._faults = Faults()
        self._thread: LinkThread | None = None

    @property
    def faults(self) -> Faults:
        """Return what went wrong on links."""
        return self._faults

    def _open(self, core: EngineCore) -> tuple[Hello, LinkThread]:
        """Take note of the engine; return what this worker says of itself, and its thread."""
        self._core = core
        self._thread = thread = LinkThread()
        core.info = msgspec.structs.replace(
            core.info, sealer=self._seal.name, hands_rows=self._hands_rows(core.info)
        )
        hello = hello_of(core.info, core.caches.managers, self._options.window_bytes)
        return hello, thread

    def _named(
        self, manager: CacheManager, spec: GenerateRequest, tag: PageTag, sealer: PageSealer
    ) -> PromptPages:
        """Return what a prompt's pages and rows are called on a link."""
        info = self._core.info
        row_bytes = int(info.uncoded_bytes_per_token) // info.num_layers
        return PromptPages(manager, spec, tag, sealer, row_bytes=row_bytes)

    def _hands_rows(self, info: ModelInfo) -> bool:
        """Tell whether a prompt of rows alone is handed over; its length decides nothing."""
        speeds, row = self._options.speeds, info.uncoded_bytes_per_token
        return info.evict == "off" and (speeds is None or speeds.rows_pay(1, 1, 0.0, row))

    def _sealer_of(self, spec: GenerateRequest) -> PageSealer | None:
        """Return what seals a request's pages on their way; None: they stay where they are."""
        try:
            return self._seal.sealer(b"" if spec.handover is None else spec.handover.key)
        except SealError as error:
            self._faults.note("nothing is handed over", error)
            return None

    def _ends_s(self, spec: GenerateRequest) -> float:
        """Return until when a request's pages may be under way."""
        most_s = self._options.expires_s
        return self._clock() + min(most_s, most_s if spec.deadline_s is None else spec.deadline_s)

    def _close(self, last: Callable[[], None] = lambda: None) -> None:
        """End all links; `last` is called on the links' thread before."""
        if self._thread is not None:
            self._thread.close(last)
