"""`share_all`: the unsafe baseline."""

from __future__ import annotations

from collections.abc import Sequence

from kvkeep.sharing.policies.base import Stateless


class ShareAll(Stateless):
    """Every page is public as soon as it is computed.

    Unsafe: tenants can time each other's prompts.
    """

    at_once = True

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return the whole chain's length."""
        return len(chain)
