"""Shadows in the schedule: views of sampled requests that are reserved, fed and given back.

A shadow has all its pages from the start, out of its tenant's share, and never more. It goes with
its sequence: both compute their last row in one step, and where the sequence lets go of its view,
the shadow does. Pages of a shadow are nobody else's and are never indexed.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvkeep.cache.caches import Caches
from kvkeep.engine.guard import Sample
from kvkeep.engine.sequence import Sequence
from kvkeep.engine.work import Lane, ViewKeeper, Work
from kvkeep.errors import CapacityError
from kvkeep.types import PAGE_TOKENS


def sample_of(sequence: Sequence) -> Sample | None:
    """Return the sample that a sequence's shadow is to serve; only a request's first has one."""
    sample = sequence.request.sample
    return None if sample is None or sequence.index or not sample.wanted else sample


class Shadows:
    """The shadow views of an engine's sequences."""

    def __init__(self, caches: Caches, keeper: ViewKeeper) -> None:
        self._caches = caches
        self._keeper = keeper

    def fits(self, sequence: Sequence) -> bool:
        """Tell whether its tenant has room for a sequence's shadow now, if it is to have one."""
        sample = sample_of(sequence)
        if sample is None:
            return True
        room = self._caches.of(sample.form).room(sequence.account)
        return room * PAGE_TOKENS >= sample.reserved_tokens

    def cast(self, sequence: Sequence, *, alone: bool) -> bool:
        """Reserve the shadow of a sequence that is to have one; False where it must wait for room.

        One whose tenant runs nothing else goes on without.
        """
        sample = sample_of(sequence)
        if sample is None:
            return True
        try:
            sequence.shadow = self._caches.of(sample.form).reserve_view(
                sample.reserved_tokens,
                account=sequence.account,
                scope=sequence.request.spec.scope,
            )
        except CapacityError:
            sample.over = alone
        return alone or sequence.shadow is not None

    def drop(self, sequence: Sequence) -> None:
        """Give back a shadow's pages."""
        if sequence.shadow is not None:
            view, sequence.shadow = sequence.shadow, None
            self._keeper.forget(view)
            self._caches.of_view(view).release(view, sequence.tokens.ids(0))

    def drop_served(self, sequences: Iterable[Sequence]) -> None:
        """Give back the pages of shadows that have said all they had to."""
        for sequence in sequences:
            if sequence.shadow is not None and sample_of(sequence) is None:
                self.drop(sequence)


def with_shadows(work: list[Work]) -> list[Work]:
    """Return a step's work with a shadow's last row beside each row that samples.

    Shadows come after all others.
    """
    shadows = {item.sequence: item for item in work if item.shadow}
    own = [item for item in work if not item.shadow]
    for item in own:
        if item.samples and item.sequence.shadow is not None:
            lane = Lane(item.sequence, shadow=True)
            shadows[item.sequence] = lane.work(len(item.sequence.tokens))
    return [*own, *shadows.values()]
