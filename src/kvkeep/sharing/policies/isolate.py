"""`isolate`: the safe null object."""

from __future__ import annotations

from collections.abc import Sequence

from kvkeep.sharing.policies.base import Stateless


class ShareNothing(Stateless):
    """Every page stays in its scope."""

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return 0."""
        return 0
