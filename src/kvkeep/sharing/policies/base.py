"""What policies without memory have in common."""

from __future__ import annotations

from kvkeep.types import Access, Chain, EpochDelta


class Stateless:
    """Remembers nothing and promotes nothing."""

    at_once = False
    by_scope = False

    def offer(self, chain: Chain, tenant: str) -> None:
        """Ignore the chain."""

    def observe(self, access: Access) -> None:
        """Ignore the access."""

    def end_epoch(self, now: float) -> EpochDelta:
        """Change nothing."""
        return EpochDelta(epoch=0)

    def forget(self, tenant: str) -> int:
        """Have nothing to forget."""
        return 0
