"""Sequences whose evicted tokens are to be given back."""

from __future__ import annotations

from kvkeep.cache.caches import Caches
from kvkeep.engine.sequence import Sequence
from kvkeep.engine.work import ViewKeeper
from kvkeep.errors import CapacityError, SealError


class Packs:
    """Packs sequences' views where there is room."""

    def __init__(self, caches: Caches, keeper: ViewKeeper) -> None:
        self._caches = caches
        self._keeper = keeper
        self.given_up = 0
        """Times that a sequence stayed masked for want of room."""

    def pack(self, sequence: Sequence) -> bool:
        """Give back what a sequence's evicted tokens took; False where there is no room to."""
        view = sequence.view
        if view is None or view.evict is None or not view.evict.pending:
            return True
        try:
            self._keeper.pack(view, self._caches.of_view(view).packing)
        except CapacityError:
            return False
        except SealError:  # the next step sees which tile was changed
            view.evict.pending = False
        return True

    def give_up(self, sequence: Sequence) -> None:
        """Let a sequence go on masked until more of it is evicted."""
        assert sequence.view is not None
        assert sequence.view.evict is not None
        sequence.view.evict.pending = False
        self.given_up += 1
