"""Who may read what another tenant computed: the seam, its null object, the unsafe baseline."""

from __future__ import annotations

from kvkeep.sharing.policies.isolate import ShareNothing
from kvkeep.sharing.policies.share_all import ShareAll
from kvkeep.sharing.state import StateStore
from kvkeep.types import Access, SharingPolicy

__all__ = ["Access", "ShareAll", "ShareNothing", "SharingPolicy", "StateStore"]
