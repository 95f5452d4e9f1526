"""What each account may hold, holds, and would give up first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from kvkeep.cache.radix import Page


@dataclass(slots=True)
class Account:
    """A reserved share of the pool.

    Every page is charged to exactly one account, however many views hold it.
    """

    name: str
    quota_pages: int = 0
    used_pages: int = 0
    evicted_pages: int = 0
    clock: int = 0
    """The account's own logical time: views it has opened."""
    unreferenced: OrderedDict[Page, None] = field(default_factory=OrderedDict)
    """Indexed pages that no view holds, the first to be evicted first.

    Children always before their parents.
    """

    @property
    def referenced_pages(self) -> int:
        """Return the pages that some view or fetch holds."""
        return self.used_pages - len(self.unreferenced)

    @property
    def room_pages(self) -> int:
        """Return how many new pages could be held if everything unreferenced were evicted."""
        return self.quota_pages - self.referenced_pages

    @property
    def idle(self) -> bool:
        """Tell whether nothing of the account is left."""
        return self.quota_pages == 0 and self.used_pages == 0


@dataclass(frozen=True, slots=True)
class AccountUse:
    """An account's share at one moment, in pages."""

    quota_pages: int
    used_pages: int
    unreferenced_pages: int
    evicted_pages: int
