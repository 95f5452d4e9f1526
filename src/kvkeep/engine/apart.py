"""Prefixes whose first pages lie in another worker: attended there, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, Protocol

import torch

from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.rows import RowsToCome
from kvkeep.errors import KernelInputError, PartLost
from kvkeep.ops.layout import Attended, AttentionPlan, LayerKV, Observe, PartOps
from kvkeep.types import View

NO_ROOM: Final = (
    "the worker that held this prompt is lost, and the tenant's share here has no room for it;"
    " send the request again"
)
PartState = Literal["awaited", "there", "lost"]


class Part(Protocol):
    """The first pages of one request's prompt, held elsewhere for as long as it runs."""

    @property
    def pages(self) -> int:
        """Return how many there are."""

    @property
    def state(self) -> PartState:
        """Return where it stands; what is lost stays lost."""

    def ask(self, layer: int, q: torch.Tensor) -> None:
        """Have rows q [T, Hq, D] of the request attend to it; waits for nothing."""

    def take(self) -> torch.Tensor | None:
        """Return the states that the rows asked for last have gathered; None: it is lost."""


class Elsewhere(Protocol):
    """Knows what of a request that is about to be queued lies in other engines."""

    def part_of(self, spec: GenerateRequest) -> Part | None:
        """Return the part of it that stays there; None: all of it is here, or comes."""

    def rows_of(self, spec: GenerateRequest) -> Mapping[str, RowsToCome]:
        """Return, by form of its pages, the rows that come beside whole ones."""


class NothingElsewhere:
    """All is here."""

    def part_of(self, spec: GenerateRequest) -> Part | None:
        """Return None."""
        return None

    def rows_of(self, spec: GenerateRequest) -> Mapping[str, RowsToCome]:
        """Return nothing."""
        return {}


class RowsApart(NamedTuple):
    """Rows of a step whose view begins elsewhere."""

    view: View
    first_row: int
    num_rows: int
    part: Part


class Gathering:
    """One step's rows of all such views; a layer's parts are asked for at a time."""

    def __init__(self, rows: Sequence[RowsApart], ops: PartOps | None) -> None:
        self._rows = rows
        self._ops = ops
        self.lost: dict[int, PartLost] = {}
        """By view: what its rows have computed since is worth nothing."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        observe: Observe | None,
    ) -> Attended:
        """Attend all of a step's rows, those of lost parts to what is here alone."""
        if self._ops is None:
            raise KernelInputError("these kernels attend whole prefixes only")
        rows, heads, dim = q.shape
        states = torch.zeros((2, rows, heads, dim + 2))
        states[..., 0] = -torch.inf
        asked = [one for one in self._rows if one.view.id not in self.lost]
        for one in asked:
            one.part.ask(layer, q[one.first_row : one.first_row + one.num_rows])
        for one in asked:
            found = one.part.take()
            if found is None:
                self.lost[one.view.id] = PartLost("the worker that held a prompt's pages is lost")
            else:
                states[:, one.first_row : one.first_row + one.num_rows] = found
        return self._ops.attend_after(q, kv, plan, states, observe)
