"""What each account may hold, holds, and would give up first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from kvkeep.cache.radix import Page
from kvkeep.types import PageKind


@dataclass(frozen=True, slots=True)
class Retention:
    """How long an account's cached pages may stay, and where."""

    ttl_s: float | None = None
    """Seconds without use after which a page goes; None: when its room is needed."""
    to_tier: bool = True
    """Whether they may leave the pool for a lower tier."""
    to_disk: bool = True
    """Whether they may go as far as a disk."""


@dataclass(slots=True)
class Account:
    """A reserved share of the pool.

    Every page is charged to exactly one account, however many views hold it.
    """

    name: str
    quota_pages: int = 0
    used_pages: int = 0
    quota_first: int | None = None
    """Of its pages, those that may be first ones; None: all."""
    used_first: int = 0
    evicted_pages: int = 0
    clock: int = 0
    """The account's own logical time: views it has opened."""
    unreferenced: OrderedDict[Page, float] = field(default_factory=OrderedDict)
    """Indexed pages that no view holds and since when, the first to be evicted first.

    Children always before their parents.
    """
    unreferenced_first: int = 0
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
    def over_quota(self) -> bool:
        """Tell whether more is held than the share allows."""
        over_first = self.quota_first is not None and self.used_first > self.quota_first
        return self.used_pages > self.quota_pages or over_first

    def is_full(self, *, first: bool) -> bool:
        """Tell whether one more page would take another's place; a `first` one's, perhaps."""
        if self.used_pages >= self.quota_pages:
            return True
        return first and self.quota_first is not None and self.used_first >= self.quota_first

    def has_room(self, count: int, *, first: bool) -> bool:
        """Tell whether `count` new pages could be held, one of them a first one."""
        if count > self.room_pages:
            return False
        referenced = self.used_first - self.unreferenced_first
        return not first or self.quota_first is None or referenced < self.quota_first

    def charge(self, page: Page, sign: int = 1) -> None:
        """Count a page, or with -1 no longer."""
        self.used_pages += sign
        self.used_first += sign * (page.kind is PageKind.FIRST)

    def rest(self, page: Page, now: float) -> None:
        """Note that nothing holds a cached page."""
        self.unreferenced[page] = now
        self.unreferenced_first += page.kind is PageKind.FIRST

    def wake(self, page: Page) -> None:
        """Note that a page which nothing held is in use or gone."""
        del self.unreferenced[page]
        self.unreferenced_first -= page.kind is PageKind.FIRST

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
