"""What each account may hold, holds, and would give up first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from kvkeep.cache.radix import Page


@dataclass(frozen=True, slots=True)
class Retention:
    """How long an account's cached pages may stay, and where."""

    ttl_s: float | None = None
    """Seconds without use after which a page goes; None: when its room is needed."""
    to_tier: bool = True
    """Whether evicted pages may go to a lower tier."""


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
    unreferenced: OrderedDict[Page, float] = field(default_factory=OrderedDict)
    """Indexed pages that no view holds and since when, the first to be evicted first.

    Children always before their parents.
    """
    retention: Retention = field(default_factory=Retention)

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


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The cache at one moment."""

    pages_total: int
    pages_used: int
    pages_free: int
    open_views: int
    accounts: dict[str, AccountUse]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was dropped of an account."""

    pages: int
    votes: int
