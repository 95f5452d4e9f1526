"""`pinned`: what the operator declares public, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from kvkeep.sharing.pins import Pins
from kvkeep.sharing.policies.base import Stateless


class SharePinned(Stateless):
    """Declared prefixes are public from the start; what tenants send never is."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return the leading pages that are pinned."""
        return self._pins.leading(chain)
