"""Who may read what another tenant computed: the seam, its null object, the unsafe baseline.

A chain is the sequence of a prompt's page hashes under the public tag, first page first; it may be
computed lazily and is valid during the call only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvkeep.types import Access, EpochDelta, SharingPolicy

__all__ = ["Access", "ShareAll", "ShareNothing", "SharingPolicy", "StateStore"]


class StateStore(Protocol):
    """Where a policy keeps its state over restarts."""

    def load(self) -> bytes | None:
        """Return what was saved last, None where nothing was."""

    def save(self, state: bytes) -> None:
        """Replace what is kept, all or nothing."""


class _Stateless:
    """Remembers nothing and promotes nothing."""

    def offer(self, chain: Sequence[bytes], tenant: str) -> None:
        """Ignore the chain."""

    def observe(self, access: Access) -> None:
        """Ignore the access."""

    def end_epoch(self, now: float) -> EpochDelta:
        """Change nothing."""
        return EpochDelta(epoch=0)

    def forget(self, tenant: str) -> None:
        """Have nothing to forget."""


class ShareNothing(_Stateless):
    """Every page stays in its scope."""

    at_once = False

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return 0."""
        return 0


class ShareAll(_Stateless):
    """Every page is public as soon as it is computed.

    Unsafe: tenants can time each other's prompts.
    """

    at_once = True

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return the whole chain's length."""
        return len(chain)
