"""One prompt on its way in: which of its pages are asked for, and what has come of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvkeep.cache.tiers import Install
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import Block, Kind, Want
from kvkeep.errors import WireError
from kvkeep.sealing import SealContext


@dataclass(slots=True)
class _Waiting:
    """Who hears of a page's layers."""

    install: Install
    done: Callable[[bool], None]


class Arriving(ABC):
    """What of one prompt is on its way in."""

    kind: Kind
    """Of which its frames are."""

    def __init__(
        self, request_id: str, number: int, pages: PromptPages, end_page: int, expires_s: float
    ) -> None:
        self.request_id = request_id
        self.number = number
        self.pages = pages
        self.expires_s = expires_s
        self.end_page = end_page
        """The pages before it have been asked for by the cache."""
        self.received_s = 0.0
        """When the last frame of it had come; on the link's thread, as is the next."""
        self.received_bytes = 0
        self.names: list[SealContext] = []
        """What the cache calls its pages."""

    @property
    @abstractmethod
    def waits(self) -> bool:
        """Tell whether something that was asked for is waited for."""

    @abstractmethod
    def check(self, block: Block) -> None:
        """Raise `WireError` where a block is none of what was asked for."""

    @abstractmethod
    def unseal(self, block: Block, frame: memoryview) -> list[memoryview]:
        """Return a block's layers; raises `SealError`."""

    @abstractmethod
    def arrived(self, block: Block, layers: list[memoryview]) -> int:
        """Take what came; return how many pages became whole by it."""

    @abstractmethod
    def lose(self, page: int) -> None:
        """Give up a page and all after it."""


class Incoming(Arriving):
    """The pages of one prompt in one cache, from the first that it lacked on."""

    kind = Kind.PAGES

    def __init__(
        self, request_id: str, number: int, pages: PromptPages, first_page: int, expires_s: float
    ) -> None:
        super().__init__(request_id, number, pages, first_page, expires_s)
        self.asked = False
        self._first = first_page
        self._lost_from = len(pages.hashes)
        self._waiting: dict[int, _Waiting] = {}
        self._layers: Counter[int] = Counter()

    @property
    def open(self) -> bool:
        """Tell whether pages are still to be had."""
        return not self.asked and self._first < self._lost_from

    @property
    def waits(self) -> bool:
        """Tell whether something that was asked for is waited for."""
        return self.asked and bool(self._waiting)

    def has(self, page: int) -> bool:
        """Tell whether a page can be asked for."""
        return self.open and page < self._lost_from

    def wait(self, page: int, install: Install, done: Callable[[bool], None]) -> None:
        """Note who waits for a page."""
        self._waiting[page] = _Waiting(install, done)
        self.end_page = max(self.end_page, page + 1)

    def want(self) -> Want:
        """Return what to ask for; once."""
        self.asked = True
        first = min(self._waiting)
        return Want(
            self.number, self.request_id, first, self.end_page, self.pages.chain(first),
            self.pages.digest,
        )  # fmt: skip

    def check(self, block: Block) -> None:
        """Raise `WireError` where a block is none of what was asked for."""
        layers = block.layer + block.layers <= self.pages.num_layers
        pages = self._first <= block.first_page and block.first_page + block.pages <= self.end_page
        if not (layers and pages and block.tag == self.pages.digest):
            raise WireError("pages came that were not asked for")

    def unseal(self, block: Block, frame: memoryview) -> list[memoryview]:
        """Return a block's layers; raises `SealError`."""
        return self.pages.open(block, frame)

    def arrived(self, block: Block, layers: list[memoryview]) -> int:
        """Install what came; return how many pages became whole by it."""
        data, whole = iter(layers), 0
        for layer in range(block.layer, block.layer + block.layers):
            for page in range(block.first_page, block.first_page + block.pages):
                waiting, piece = self._waiting.get(page), next(data)
                if waiting is None:
                    continue
                waiting.install(layer, piece)
                self._layers[page] += 1
                if self._layers[page] == self.pages.num_layers:
                    del self._waiting[page]
                    waiting.done(True)
                    whole += 1
        return whole

    def lose(self, page: int) -> None:
        """Give up a page and all after it."""
        self._lost_from = min(self._lost_from, page)
        for at in sorted(self._waiting):
            if at >= page:
                self._waiting.pop(at).done(False)
