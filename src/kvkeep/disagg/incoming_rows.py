"""Rows behind one prompt's last whole pages, on their way in: they wait outside the cache."""

from __future__ import annotations

from collections.abc import Sequence

from kvkeep.disagg.incoming import Arriving
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import Block, Kind, WantRows
from kvkeep.engine.rows import RowsState
from kvkeep.errors import WireError


class IncomingRows(Arriving):
    """The rows of one prompt in one form of its pages; a `RowsToCome`. They have no names."""

    kind = Kind.OPEN

    def __init__(
        self, request_id: str, number: int, pages: PromptPages, length: int, expires_s: float
    ) -> None:
        """`length`: of the prompt."""
        super().__init__(request_id, number, pages, pages.open_page, expires_s)
        self._end = length
        self._state: RowsState = "awaited"
        self._layers: list[memoryview] = []

    @property
    def state(self) -> RowsState:
        """Return where they stand; what is lost stays lost."""
        return self._state

    @property
    def first(self) -> int:
        """Return the position of the first."""
        return self._end - self.pages.open_tokens

    @property
    def end(self) -> int:
        """Return the position behind the last: the prompt's length."""
        return self._end

    @property
    def size(self) -> int:
        """Return the bytes that they take or may take."""
        return 0 if self._state == "lost" else self.pages.open_bytes

    @property
    def waits(self) -> bool:
        """Tell whether something is waited for."""
        return self._state == "awaited"

    def want(self) -> WantRows:
        """Return what to ask for."""
        chain = self.pages.chain(self.pages.open_page)
        return WantRows(self.number, self.request_id, chain, self.pages.digest)

    def check(self, block: Block) -> None:
        """Raise `WireError` where a block is none of what was asked for."""
        inside = block.layer + block.layers <= self.pages.num_layers
        if not inside or block != self.pages.open_block(self.number, block.layer, block.layers):
            raise WireError("rows came that were not asked for")

    def unseal(self, block: Block, frame: memoryview) -> list[memoryview]:
        """Return each layer's rows; raises `SealError`."""
        return self.pages.open_open(block, frame)

    def arrived(self, block: Block, layers: list[memoryview]) -> int:
        """Take what came; return 0, the pages that became whole by it."""
        if self._state == "awaited" and block.layer == len(self._layers):
            self._layers += layers
            if len(self._layers) == self.pages.num_layers:
                self._state = "there"
        return 0

    def take(self) -> Sequence[memoryview]:
        """Return each layer's [2, T, Hkv, D]; they are given once."""
        layers, self._layers, self._state = self._layers, [], "lost"
        return layers

    def lose(self, page: int) -> None:
        """Give them up, with a page and all after it."""
        self._layers, self._state = [], "lost"
