"""The rows of a step: whose they are and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvkeep.cache.packing import Packing
from kvkeep.engine.rows import RowsToCome
from kvkeep.engine.sequence import Sequence
from kvkeep.types import PAGE_TOKENS, View


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one sequence in one step: positions `start` to `start + count`."""

    sequence: Sequence
    start: int
    count: int
    shadow: bool = False
    """Whether the rows are those of its shadow."""

    @property
    def view(self) -> View:
        """Return the view the rows are stored in and attend to."""
        view = self.sequence.shadow if self.shadow else self.sequence.view
        assert view is not None
        return view

    @property
    def samples(self) -> bool:
        """Return whether the step reaches the sequence's last token."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def commits(self) -> bool:
        """Tell, once its rows are stored, whether its scope is to find them: a page is full.

        What others may have made faster is found when the prompt is whole, as if it had not been.
        """
        sequence, length = self.sequence, self.view.length
        if sequence.uncommitted:
            return length >= sequence.prompt_len
        return length // PAGE_TOKENS > self.start // PAGE_TOKENS


class Lane(NamedTuple):
    """What computes rows: a sequence, or its shadow."""

    sequence: Sequence
    shadow: bool = False

    @property
    def position(self) -> int:
        """Return the first row it has to compute, or the last token's."""
        return self.sequence.shadow_position() if self.shadow else self.sequence.next_position()

    def work(self, end: int) -> Work:
        """Return its rows up to `end`."""
        return Work(self.sequence, self.position, end - self.position, self.shadow)


Planned = dict[Lane, int]
"""Where each lane's rows of a step end."""


class ViewKeeper(Protocol):
    """Remembers something per view."""

    def forget(self, view: View) -> None:
        """Drop what is remembered of a view that ended."""

    def fork(self, view: View, twin: View) -> None:
        """Remember of a fork what is remembered of its source."""

    def go_on(self, view: View, rows: RowsToCome) -> None:
        """Let a view that ends before another engine's rows go on behind them."""

    def pack(self, view: View, packing: Packing) -> None:
        """Give back what a view's evicted tokens took; raises `CapacityError` without room."""
