"""Pages with their owners: pool, index and accounts are changed together, so that none drifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvkeep.cache.accounts import Account, AccountUse, CacheStats
from kvkeep.cache.below import Below
from kvkeep.cache.parts import Pages
from kvkeep.cache.radix import Page, RadixIndex
from kvkeep.errors import ConfigError, EngineError, PoolExhausted, QuotaExceeded
from kvkeep.types import PAGE_TOKENS, PUBLIC_SCOPE, Int32Array, PageKind, PageState, PageTag

PUBLIC_ACCOUNT = PUBLIC_SCOPE
"""The account that public pages are charged to."""


class PageStore:
    """Makes, locks, charges, evicts and frees pages; knows nothing of views."""

    def __init__(self, pool: Pages, index: RadixIndex, below: Below | None) -> None:
        self.pool = pool
        self.index = index
        self._below = below
        self.accounts: dict[str, Account] = {}
        self._kept: list[Page] = []
        self.now = 0.0
        """The time of the last epoch's end, in seconds."""

    def set_quotas(self, quotas: Mapping[str, int], public_pages: int) -> None:
        """Set every account's share; accounts left out keep only what running views hold."""
        wanted = {**quotas, PUBLIC_ACCOUNT: public_pages}
        if PUBLIC_ACCOUNT in quotas:
            raise ConfigError(f"quotas: {PUBLIC_ACCOUNT!r} is reserved; use public_pages")
        if any(pages < 0 for pages in wanted.values()):
            raise ConfigError("quotas: a share is negative; give 0 pages or more")
        total = sum(wanted.values())
        if total > self.pool.num_pages:
            raise ConfigError(
                f"quotas: {total} pages of a pool of {self.pool.num_pages}; lower the shares"
            )
        first = self._first_shares({name: pages for name, pages in wanted.items() if pages})
        self._check_kept(public_pages, first.get(PUBLIC_ACCOUNT, 0))
        for name in wanted:
            self.accounts.setdefault(name, Account(name))
        for name, account in list(self.accounts.items()):
            account.quota_pages = wanted.get(name, 0)
            account.quota_first = first.get(name, 0) if self.pool.num_first else None
            self.trim(name)

    def share(self, name: str) -> Account:
        """Return an account, an empty one where it has no share."""
        return self.accounts.get(name) or Account(name)

    def stats(self, open_views: int) -> CacheStats:
        """Return counts of all accounts and of the pool."""
        free, total = self.pool.free_pages, self.pool.num_pages
        uses = {
            name: AccountUse(a.quota_pages, a.used_pages, len(a.unreferenced), a.evicted_pages)
            for name, a in self.accounts.items()
        }
        return CacheStats(total, total - free, free, open_views, uses)

    def account(self, name: str) -> Account:
        """Return an account; raises `QuotaExceeded` where it has no share at all."""
        found = self.accounts.get(name)
        if found is None:
            raise QuotaExceeded(f"account {name!r} has no reserved share: add it to the quotas")
        return found

    def new_pages(self, account: str, tag: PageTag, count: int, *, at: int) -> list[Page]:
        """Return `count` empty pages, locked once, evicting unreferenced ones of this account.

        They follow the first `at` pages of a sequence.

        Raises `QuotaExceeded` before anything changes, `PoolExhausted` where the pool is short
        all the same.
        """
        owner = self.account(account)
        first = at == 0 and count > 0 and self.pool.num_first > 0
        self._make_room(owner, count, first=first)
        pages: list[Page] = []
        try:
            for i in range(count):
                kind = PageKind.FIRST if first and i == 0 else PageKind.PLAIN
                page = Page(self._alloc(owner, kind), account, tag, kind)
                page.ref_count = 1
                owner.charge(page)
                pages.append(page)
        except PoolExhausted:
            for page in pages:
                self.unlock(page)
            raise
        return pages

    def share_pages(self, account: str, tag: PageTag, sources: Sequence[Page]) -> list[Page]:
        """Return pages over the memory of full ones, locked once and charged like any other.

        Their bytes stay while either is held. Raises `QuotaExceeded` before anything changes.
        """
        owner = self.account(account)
        first = any(source.kind is PageKind.FIRST for source in sources)
        self._make_room(owner, len(sources), first=first)
        pages: list[Page] = []
        for source in sources:
            self.pool.hold_page(source.slot)
            page = Page(source.slot, account, tag, source.kind)
            page.state, page.ref_count = source.state, 1
            owner.charge(page)
            pages.append(page)
        return pages

    def lock(self, page: Page) -> None:
        """Hold a page: it is neither evicted nor freed until `unlock`."""
        if page.ref_count == 0:
            self.accounts[page.account].wake(page)
        page.ref_count += 1

    def keep(self, page: Page) -> None:
        """Hold a public page for good: it is never evicted, and the public share must hold it."""
        self.lock(page)
        self._kept.append(page)

    def unlock(self, page: Page) -> None:
        """Let go of a page.

        Of a chain, the deepest first, so that children are evicted before parents.
        """
        if page.ref_count <= 0:
            raise EngineError("a page was unlocked more often than locked")
        page.ref_count -= 1
        if page.ref_count == 0:
            if page.attached:
                owner = self.accounts[page.account]
                owner.rest(page, self.now)
                if self._below is not None and _may_leave(page):
                    self._below.rest(page, owner.retention)
                self._shrink(owner)
            else:
                self._free(page)

    def evict_pages(self, account: str, count: int) -> int:
        """Evict up to `count` unreferenced pages, the least recently used first.

        Return how many.
        """
        owner = self.account(account)
        for done in range(count):
            if not owner.unreferenced:
                return done
            page = next(iter(owner.unreferenced))
            if self._below is not None:
                self._below.evicted(page)
            self.drop(page)
            owner.evicted_pages += 1
        return max(count, 0)

    def expire(self, now: float) -> None:
        """Take note of the time and drop pages unused for longer than their account keeps them."""
        self.now = now
        for owner in self.accounts.values():
            ttl_s = owner.retention.ttl_s
            while ttl_s is not None and owner.unreferenced:
                page, since = next(iter(owner.unreferenced.items()))
                if since > now - ttl_s:
                    break
                self.drop(page)

    def trim(self, account: str) -> None:
        """Evict what an account holds beyond its share, as far as views allow.

        Forget an account left empty.
        """
        owner = self.accounts.get(account)
        if owner is None:
            return
        self._shrink(owner)
        if owner.idle and account != PUBLIC_ACCOUNT:
            del self.accounts[account]

    def drop(self, page: Page) -> None:
        """Take a leaf out of the index; it is freed now, or when its last view lets go."""
        self.index.detach(page)
        if self._below is not None:
            self._below.dropped(page)
        if page.ref_count == 0:
            self.accounts[page.account].wake(page)
            self._free(page)

    def drop_below(self, top: Page) -> int:
        """Drop every page below `top`; return how many."""
        pages = self.index.leaves_first(top)
        for page in pages:
            self.drop(page)
        return len(pages)

    def attach(self, parent: Page, page: Page, key: bytes) -> None:
        """Index a page below `parent`; partial leaves that it makes redundant are freed."""
        if page.account != parent.account:
            raise EngineError(
                "a page can be indexed only in a tree of the account that pays for it"
            )
        self.index.attach(parent, page, key)
        if page.n_tokens == PAGE_TOKENS and page.state is PageState.OPEN:
            page.state = self.pool.spec.last_state
        for length in range(4, len(key), 4) if parent.partials else ():
            shorter = parent.partials.get(key[:length])
            if shorter is not None and shorter.ref_count == 0:
                self.drop(shorter)

    def charge_public(self, page: Page) -> bool:
        """Move a held page's charge to the public share, evicting public pages.

        False where that is full.
        """
        public = self.accounts.get(PUBLIC_ACCOUNT)
        first = page.kind is PageKind.FIRST
        if public is None or not public.has_room(1, first=first):
            return False
        self._make_room(public, 1, first=first)
        self.accounts[page.account].charge(page, -1)
        public.charge(page)
        page.account, page.pinned = PUBLIC_ACCOUNT, True
        return True

    def take_tiles(self, account: str, wanted: NDArray[np.bool_]) -> Int32Array:
        """Take tiles of no page where `wanted` [n, L, Hkv]; their ids are in its order.

        After a quota moved away, the account's own pages make way. Raises `PoolExhausted`.
        """
        owner = self.account(account)
        while True:
            try:
                return self._taken(wanted)
            except PoolExhausted:
                if not owner.unreferenced:
                    raise
            self.evict_pages(owner.name, 1)

    def _taken(self, wanted: NDArray[np.bool_]) -> Int32Array:
        """Take tiles of every size, or of none."""
        table = np.full(wanted.shape, -1, np.int32)
        try:
            for where in self.pool.spec.alike():
                own = wanted & where
                layer, head = np.argwhere(where)[0].tolist()
                table[own] = self.pool.alloc_tiles(int(own.sum()), layer, head)
        except PoolExhausted:
            self.pool.free_tiles(table[table >= 0])
            raise
        return table[wanted]

    def make_room(self, account: str, count: int) -> None:
        """Evict what an account must give up for `count` more pages; raises `QuotaExceeded`."""
        self._make_room(self.account(account), count, first=False)

    def _make_room(self, owner: Account, count: int, *, first: bool) -> None:
        """Evict what an account must give up for `count` more pages, one of them a first one."""
        if count > owner.room_pages:
            raise QuotaExceeded(
                f"account {owner.name!r} needs {count} more pages; its share of "
                f"{owner.quota_pages} has room for {max(owner.room_pages, 0)}"
            )
        if not owner.has_room(count, first=first):
            raise QuotaExceeded(
                f"account {owner.name!r} begins one more sequence; its share has room for "
                f"{owner.quota_first}"
            )
        self.evict_pages(owner.name, owner.used_pages + count - owner.quota_pages)
        while first and owner.is_full(first=True) and owner.unreferenced:
            self.evict_pages(owner.name, 1)

    def _shrink(self, owner: Account) -> None:
        """Evict what an account holds beyond its share, as far as nothing uses it."""
        while owner.over_quota and owner.unreferenced:
            self.evict_pages(owner.name, 1)

    def _check_kept(self, public_pages: int, public_first: int) -> None:
        """Raise `ConfigError` where the public share does not hold the pages kept for good."""
        first = sum(page.kind is PageKind.FIRST for page in self._kept)
        if len(self._kept) > public_pages or first > (public_first if self.pool.num_first else 0):
            raise ConfigError(
                f"share_pinned: the prefixes take {len(self._kept)} pages; tenants' shares leave "
                f"{public_pages} with room for {public_first} sequences: raise share_pool, or "
                "lower the shares"
            )

    def _first_shares(self, quotas: Mapping[str, int]) -> dict[str, int]:
        """Return how many pages of each share may be first ones: one, and a part of the rest."""
        rest = self.pool.num_first - len(quotas)
        if rest < 0 and self.pool.num_first:
            raise ConfigError(
                f"quotas: {len(quotas)} shares of a pool with room for {self.pool.num_first}"
                " sequences; raise max_num_seqs"
            )
        return {name: 1 + pages * rest // self.pool.num_pages for name, pages in quotas.items()}

    def _alloc(self, owner: Account, kind: PageKind) -> int:
        """Take a slot; after a quota moved away, the account's own pages make way first."""
        while not self.pool.free_of(kind) and owner.unreferenced:
            self.evict_pages(owner.name, 1)
        return self.pool.alloc_page(kind)

    def _free(self, page: Page) -> None:
        self.pool.free_page(page.slot)
        self.accounts[page.account].charge(page, -1)
        page.slot = -1


def _may_leave(page: Page) -> bool:
    """Tell whether a page may go to a tier: a full one of a scope."""
    return page.n_tokens == PAGE_TOKENS and page.account != PUBLIC_ACCOUNT
